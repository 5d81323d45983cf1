"""Decoding on the CPU: a DALI pipeline that decodes regions of JPEGs, bit for bit as PIL does."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import fn, math

types: Any = dali.types
_DECODE_BATCH = 256


class Decoder:
    """Decodes regions of many JPEGs at once; safe to call from several threads."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._pipeline: Any = None

    def decode(self, data: list[NDArray[np.uint8]], regions: NDArray[np.int64]) -> list[Any]:
        """Each entry's region as a DALI tensor [h, w, 3] uint8, None where it cannot be decoded.

        `regions` [U, 4] xyxy is trimmed to the images in place.
        """
        parts = (slice(start, start + _DECODE_BATCH) for start in range(0, len(data), _DECODE_BATCH))
        with self._lock:
            return [image for part in parts for image in self._decode_batch(data[part], regions[part])]

    def _decode_batch(self, data: list[NDArray[np.uint8]], regions: NDArray[np.int64]) -> list[Any]:
        if self._pipeline is None:
            self._pipeline = _decoding(batch_size=_DECODE_BATCH, num_threads=self._num_threads, device_id=None, prefetch_queue_depth=1)
        try:
            self._pipeline.feed_input("data", data)
            self._pipeline.feed_input("start", np.ascontiguousarray(regions[:, 1::-1], np.int32))
            self._pipeline.feed_input("end", np.ascontiguousarray(regions[:, :1:-1], np.int32))
            decoded, start = self._pipeline.run()
        except RuntimeError:
            # One bad entry fails the batch and leaves the pipeline unusable: halve until the bad ones stand alone.
            self._pipeline = None
            if len(data) == 1:
                return [None]
            half = len(data) // 2
            return self._decode_batch(data[:half], regions[:half]) + self._decode_batch(data[half:], regions[half:])
        images = [decoded[i] for i in range(len(data))]
        regions[:, 1::-1] = start.as_array()
        regions[:, 2:] = regions[:, :2] + [image.shape()[1::-1] for image in images]
        return images

    def close(self) -> None:
        with self._lock:
            self._pipeline = None


@dali.pipeline_def  # type: ignore[attr-defined, untyped-decorator]
def _decoding() -> Any:
    data = fn.external_source(name="data", no_copy=True)
    start, end = fn.external_source(name="start"), fn.external_source(name="end")
    shape = fn.cast(fn.peek_image_shape(data, adjust_orientation=False), dtype=types.INT32)[:2]
    start, end = math.min(start, shape - 1), math.min(end, shape)
    return fn.decoders.image_slice(data, start=start, end=end, axes=(0, 1), adjust_orientation=False, output_type=types.RGB), start
