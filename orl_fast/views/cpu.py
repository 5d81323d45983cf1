"""The CPU renderer: DALI decodes each source once and only where crops lie, or its pixels are stored; numba kernels render all crops into
one block of memory.

Decoded pixels are PIL's bit for bit. A finished view differs from the reference's by 0.2 levels of 255 on average; of a thousand values one
differs by more than 4, where the hue or solarization makes more of a rounding (without those: by more than 2). Tests hold it to that.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.cores import num_cores
from orl_fast.shards.decode import Decoder
from orl_fast.shards.pixels import Decoded
from orl_fast.shards.reader import advise
from orl_fast.views import kernels
from orl_fast.views.plan import AnyImage, Batch, ImageSource, Rows, ViewPlan, needed_regions, without_bad


class CpuRenderer:
    """Renders plans on `num_threads` cores. Several threads may call `render`: while one batch is decoded, another is drawn."""

    def __init__(self, source: ImageSource, *, num_threads: int = 0, pin_memory: bool = False) -> None:
        """With `pin_memory`, views go to a GPU, so they are put where it copies from fastest."""
        self._source, self._pin_memory = source, pin_memory
        self._num_threads = num_threads or num_cores()
        self._decoder = Decoder(self._num_threads)
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="render")

    def render(self, plan: ViewPlan) -> Batch:
        sources, places = np.unique(plan.crops.source, return_inverse=True)
        regions = needed_regions(plan, places, len(sources))
        times = [time.perf_counter()]
        images = self._read(sources, regions)
        times.append(time.perf_counter())
        addresses, scales, decoded = self._decode(images, regions)  # the pixels are held until all views are drawn
        times.append(time.perf_counter())
        views = self._draw(plan, addresses, regions, scales, places)
        times.append(time.perf_counter())
        del decoded
        seconds = dict(zip(("reading", "decoding", "drawing"), np.diff(times).tolist(), strict=True))
        return replace(without_bad(plan, views, sources[addresses == 0]), seconds=seconds)

    def _read(self, sources: Rows, regions: NDArray[np.int64]) -> Sequence[AnyImage]:
        """The images, in memory as far as they are needed: page faults come here and not in the middle of the other work."""
        images = self._source.views(sources)

        def read(part: tuple[int, int]) -> None:
            for u in range(*part):
                image, (_, top, _, bottom) = images[u], regions[u].tolist()
                advise(image.lines(top, bottom) if isinstance(image, Decoded) else image, now=True)

        list(self._pool.map(read, pairwise(self._chunks(len(images)))))
        return images

    def _decode(self, images: Sequence[AnyImage], regions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64], list[Any]]:
        """Where the pixels are (0: they cannot be decoded), their scale, and what holds them; `regions` become what the pixels show."""
        addresses, scales, encoded = np.zeros(len(images), np.int64), np.ones((len(images), 2)), {}
        for u, image in enumerate(images):
            if isinstance(image, Decoded):
                height, width, _ = image.pixels.shape
                addresses[u], regions[u] = image.pixels.ctypes.data, (0, 0, width, height)
                scales[u] = width / image.width, height / image.height
            else:
                encoded[u] = image
        where = np.array(list(encoded), np.int64)
        parts = regions[where]
        decoded = self._decoder.decode(list(encoded.values()), parts)
        regions[where], addresses[where] = parts, [0 if image is None else image.data_ptr() for image in decoded]
        return addresses, scales, [images, decoded]

    def _draw(
        self, plan: ViewPlan, addresses: NDArray[np.int64], regions: NDArray[np.int64], scales: NDArray[np.float64], places: Rows
    ) -> list[torch.Tensor]:
        """[B, S, S, 3] of each view."""
        sizes, num, crops = np.array(list(plan.sizes_px.values()), np.int64), len(plan.rows), plan.crops
        ends = np.cumsum(num * sizes * sizes * 3)
        # One block for all views. It is new for each plan: a batch that is held keeps its memory.
        out = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self._pin_memory)
        pixels = out.numpy()

        def draw(samples: tuple[int, int]) -> None:
            kernels.render_crops(
                samples, num, addresses, regions, scales, places, crops.box, plan.beyond_box, crops.flip, crops.order, crops.factors,
                crops.hue, crops.grayscale, crops.blur_sigma, crops.solarize, sizes, pixels,
            )  # fmt: skip

        list(self._pool.map(draw, pairwise(self._chunks(num))))  # waits for all, and raises what one raised
        return [part.view(num, size, size, 3) for part, size in zip(out.tensor_split(ends[:-1].tolist()), sizes.tolist(), strict=True)]

    def _chunks(self, num: int) -> list[int]:
        """The edges of a few chunks per thread: enough to even out the work, few enough that Python is not felt."""
        return list(np.unique(np.linspace(0, num, min(num, 8 * self._num_threads) + 1).astype(int)).tolist())

    def close(self) -> None:
        self._pool.shutdown()
        self._decoder.close()
