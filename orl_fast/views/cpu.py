"""The CPU renderer: DALI decodes each source once and only where crops lie, numba kernels render all crops into one block of memory.

Decoded pixels are PIL's bit for bit. A finished view differs from the reference's by 0.2 levels of 255 on average; of a thousand values one
differs by more than 4, where the hue or solarization makes more of a rounding (without those: by more than 2). Tests hold it to that.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import fn, math

from orl_fast.views import kernels
from orl_fast.views.plan import ViewPlan
from orl_fast.views.renderer import ImageSource, Rendered, without_bad

types: Any = dali.types
_DECODE_BATCH = 256
_FILTER_MARGIN_PX = 2


class CpuRenderer:
    """Renders plans on `num_threads` cores (see `orl_fast.views.renderer.Renderer`).

    Several threads may call `render`: while one batch is decoded, another is drawn. Close it, or use it as a context manager.
    """

    def __init__(self, source: ImageSource, *, num_threads: int = 0) -> None:
        self._source = source
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._decoder = Decoder(self._num_threads)
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="render")

    def render(self, plan: ViewPlan) -> Rendered:
        sources, places = np.unique(plan.crops.source, return_inverse=True)
        regions = _regions(plan, places, len(sources))
        images = self._decoder.decode([self._source.view(int(source)) for source in sources], regions)
        addresses = np.array([0 if image is None else image.data_ptr() for image in images], np.int64)
        sizes = np.array([slot.size_px for slot in plan.slots], np.int64)
        num = len(plan.rows)
        ends = np.cumsum(num * sizes * sizes * 3)
        # One block for all slots. It is new for each plan: whoever holds a batch holds its memory.
        out = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        crops, pixels = plan.crops, out.numpy()

        def draw(samples: tuple[int, int]) -> None:
            kernels.render_crops(
                samples, num, addresses, regions, places, crops.box, plan.beyond_box, crops.flip, crops.order, crops.factors, crops.hue,
                crops.grayscale, crops.blur_sigma, crops.solarize, sizes, pixels,
            )  # fmt: skip

        # A few chunks per thread: enough to even out the work, few enough that Python is not felt.
        edges = np.unique(np.linspace(0, num, min(num, 8 * self._num_threads) + 1).astype(int)).tolist()
        list(self._pool.map(draw, pairwise(edges)))  # waits for all, and raises what one raised
        batches = [part.view(num, size, size, 3) for part, size in zip(out.tensor_split(ends[:-1].tolist()), sizes.tolist(), strict=True)]
        return without_bad(plan, batches, sources[addresses == 0])

    def close(self) -> None:
        self._pool.shutdown()
        self._decoder.close()

    def __enter__(self) -> "CpuRenderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Decoder:
    """A DALI pipeline that decodes regions of JPEGs; bit for bit what PIL decodes."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._pipeline: Any = None

    def decode(self, data: list[NDArray[np.uint8]], regions: NDArray[np.int64]) -> list[Any]:
        """Decode each entry's region; `regions` [U, 4] xyxy is trimmed to the image in place.

        Returns:
            DALI tensors [h, w, 3] uint8; None where an entry cannot be decoded.
        """
        images: list[Any] = []
        with self._lock:
            for start in range(0, len(data), _DECODE_BATCH):
                images += self._decode_batch(data[start : start + _DECODE_BATCH], regions[start : start + _DECODE_BATCH])
        return images

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


def _regions(plan: ViewPlan, places: NDArray[np.int64], num_sources: int) -> NDArray[np.int64]:
    """[U, 4] int64 xyxy: what the crops need of each source; not trimmed to the source yet."""
    low, high = np.floor(plan.crops.box[:, :2]).astype(np.int64), np.ceil(plan.crops.box[:, 2:]).astype(np.int64)
    if plan.beyond_box:
        sizes = np.repeat([slot.size_px for slot in plan.slots], len(plan.rows))[:, None]
        reach = np.ceil(np.maximum((high - low) / sizes, 1)).astype(np.int64) + _FILTER_MARGIN_PX
        low, high = low - reach, high + reach
    regions = np.zeros((num_sources, 4), np.int64)
    regions[:, :2] = np.iinfo(np.int32).max
    np.minimum.at(regions[:, :2], places, np.maximum(low, 0))
    np.maximum.at(regions[:, 2:], places, high)
    return regions
