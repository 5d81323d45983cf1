"""What a renderer takes and gives. Renderers: `reference` (PIL and torchvision), `cpu` (DALI and numba), `gpu` (one DALI graph)."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.views.batch import Batch, Rows
from orl_fast.views.plan import ViewPlan


class ImageSource(Protocol):
    """Encoded images by row: `ShardReader` (memory-mapped shards), `PatchedSource`, or one of your own.

    `views` is called from several threads. It returns the bytes of each row, [size] uint8, in the order asked for, without a copy where
    that is possible; they must stay valid as long as the arrays are held. An image that is missing or damaged may be any bytes: the
    renderer skips and counts what does not decode. `close` lets go of files and threads.
    """

    def views(self, rows: Rows, /) -> list[NDArray[np.uint8]]: ...

    def close(self) -> None: ...


class Renderer(Protocol):
    """Renders plans; safe to call from several threads."""

    def render(self, plan: ViewPlan) -> Batch: ...

    def close(self) -> None: ...


def usable_samples(plan: ViewPlan, bad_sources: Rows) -> NDArray[np.bool_]:
    """[B]: which samples need no bad source in any view."""
    bad = np.isin(plan.crops.source, bad_sources).reshape(len(plan.sizes_px), len(plan.rows))
    return np.logical_not(bad.any(axis=0))


def without_bad(plan: ViewPlan, pixels: Iterable[torch.Tensor], bad_sources: Rows) -> Batch:
    """The usable samples of pixels [B, S, S, 3], one tensor per view."""
    kept = usable_samples(plan, bad_sources)
    views = ((batch if kept.all() else batch[torch.from_numpy(kept)]).permute(0, 3, 1, 2) for batch in pixels)
    named = dict(zip(plan.sizes_px, views, strict=True))
    return Batch(views=named, rows=plan.rows[kept], bad_rows=plan.rows[~kept], bad_sources=bad_sources)
