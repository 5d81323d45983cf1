"""Views in, features out: plans are rendered ahead of the encoder, which gets full batches and computes in float32."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orl_fast.errors import DataError
from orl_fast.views.normalize import normalize
from orl_fast.views.plan import Renderer, ViewPlan

Key = TypeVar("Key")
_Item = TypeVar("_Item")
MAX_DECODED_BYTES = 1 << 28  # of the images of a plan, see `bounded`
_AHEAD = 2  # rendered plans that wait for the encoder


def encode(
    forward: Callable[[Tensor], Tensor],  # normalized float images [B, 3, H, W] → [B, D], a method of an Encoder on `device`
    renderer: Renderer,
    plans: Iterable[tuple[Key, ViewPlan]],  # plans of equal keys follow one another
    *,
    batch_size: int,
    device: torch.device,
    skip: Callable[[NDArray[np.int64]], None],  # called with the rows of images that cannot be decoded, whose samples are left out
) -> Iterator[tuple[Key, NDArray[np.float32]]]:
    """Encode the one view of each sample of some plans, in order: yields a key, and features [B, D] float32; DataError if not finite.

    Batches hold `batch_size` views, the last of each key fewer: those of one key do not depend on what else is encoded. TF32 is not used.
    """

    def views(plan: ViewPlan) -> Tensor:
        batch = renderer.render(plan)
        if len(batch.bad_rows):
            skip(batch.bad_rows)
        return batch.views["view"]

    rendered = _ahead((key, views(plan)) for key, plan in plans)
    for key, group in groupby(rendered, key=itemgetter(0)):
        for batch in _full_batches((pixels for _, pixels in group), batch_size):
            with torch.inference_mode(), torch.autocast(device.type, enabled=False), _float32():
                features = forward(normalize(batch.to(device, non_blocking=True))).cpu().numpy()
            if not np.isfinite(features).all():
                raise DataError("features are not finite: the weights of the checkpoint are damaged; use an earlier checkpoint")
            yield key, features


def bounded(images: range, *, num_crops: NDArray[np.int64], num_bytes: NDArray[np.int64], max_crops: int) -> Iterator[range]:
    """Cut consecutive images into ranges of at most `max_crops` crops and MAX_DECODED_BYTES each, or of a single image that exceeds them.

    `num_crops` and `num_bytes`, [len(images)], are the crops of each image, and its decoded size.
    """
    start, crops, size = images.start, 0, 0
    for image, more_crops, more_bytes in zip(images, num_crops.tolist(), num_bytes.tolist(), strict=True):
        if image > start and (crops + more_crops > max_crops or size + more_bytes > MAX_DECODED_BYTES):
            yield range(start, image)
            start, crops, size = image, 0, 0
        crops, size = crops + more_crops, size + more_bytes
    yield range(start, images.stop)


@contextmanager
def _float32() -> Iterator[None]:
    """Compute in float32 on a GPU too, where convolutions use TF32 by default."""
    switches: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    former = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, former, strict=True):
            switch.fp32_precision = precision


def _full_batches(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut and join tensors to `size` entries each; the last holds the remainder."""
    waiting: Tensor | None = None
    for batch in batches:
        waiting = batch if waiting is None else torch.cat([waiting, batch])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting is not None and len(waiting):
        yield waiting


def _ahead(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the items, computed in a thread that is a few of them ahead."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, None) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, iterator, None))
            yield item
