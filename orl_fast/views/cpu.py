"""The CPU renderer: DALI decodes each source once and only where crops lie, numba kernels render all crops into one block of memory.

Decoded pixels are PIL's bit for bit. A finished view differs from the reference's by 0.2 levels of 255 on average; of a thousand values one
differs by more than 4, where the hue or solarization makes more of a rounding (without those: by more than 2). Tests hold it to that.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.cores import num_cores
from orl_fast.views import kernels
from orl_fast.views.decode import Decoder
from orl_fast.views.plan import Batch, ImageSource, ViewPlan, without_bad

_FILTER_MARGIN_PX = 2


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
        regions = _regions(plan, places, len(sources))
        images = self._decoder.decode(self._source.views(sources), regions)
        addresses = np.array([0 if image is None else image.data_ptr() for image in images], np.int64)
        sizes = np.array(list(plan.sizes_px.values()), np.int64)
        num = len(plan.rows)
        ends = np.cumsum(num * sizes * sizes * 3)
        # One block for all views. It is new for each plan: a batch that is held keeps its memory.
        out = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self._pin_memory)
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


def _regions(plan: ViewPlan, places: NDArray[np.int64], num_sources: int) -> NDArray[np.int64]:
    """[U, 4] int64 xyxy: what the crops need of each source; not trimmed to the source yet."""
    low, high = np.floor(plan.crops.box[:, :2]).astype(np.int64), np.ceil(plan.crops.box[:, 2:]).astype(np.int64)
    if plan.beyond_box:
        sizes = np.repeat(list(plan.sizes_px.values()), len(plan.rows))[:, None]
        reach = np.ceil(np.maximum((high - low) / sizes, 1)).astype(np.int64) + _FILTER_MARGIN_PX
        low, high = low - reach, high + reach
    regions = np.zeros((num_sources, 4), np.int64)
    regions[:, :2] = np.iinfo(np.int32).max
    np.minimum.at(regions[:, :2], places, np.maximum(low, 0))
    np.maximum.at(regions[:, 2:], places, high)
    return regions
