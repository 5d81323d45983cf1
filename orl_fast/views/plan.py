"""What a renderer takes and gives: a `ViewPlan` holds all parameters of a batch of views, an `ImageSource` the images, a `Batch` the views.

"Draw on the host, render on the device": plans are drawn by pure functions of (seed, epoch, image, stream), renderers execute them and hold
no randomness. So any step of any epoch can be drawn alone, by any rank or thread, and two renderers can be compared on the same views.
Renderers: `reference` (PIL and torchvision), `cpu` (DALI and numba), `gpu` (one DALI graph).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.shards.pixels import Decoded

_FILTER_MARGIN_PX = 2
AnyImage = NDArray[np.uint8] | Decoded
Rows = NDArray[np.int64]
Sides = NDArray[np.int32]  # [N] heights or widths of all images, pixels


@dataclass(frozen=True, kw_only=True)
class Crops:
    """M crops: cut out the box, resize it (bilinear, antialiased), flip, change colors in `order`, grayscale, blur, solarize."""

    source: Rows  # [M] row of the image read from; from N on: number of a stored partner patch, plus N
    box: NDArray[np.float32]  # [M, 4] xyxy, pixels of the source
    flip: NDArray[np.bool_]  # [M]
    order: NDArray[np.uint8]  # [M, 4] a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    factors: NDArray[np.float32]  # [M, 3] of brightness, contrast and saturation; 1: unchanged
    hue: NDArray[np.float32]  # [M] turns; 0: unchanged
    grayscale: NDArray[np.bool_]  # [M]
    blur_sigma: NDArray[np.float32]  # [M] pixels of the view; 0: none
    solarize: NDArray[np.bool_]  # [M] values from 128 on are inverted

    @classmethod
    def plain(cls, source: Rows, box: NDArray[np.float32]) -> "Crops":
        """Crops that are resized and otherwise left alone."""
        m = len(source)
        order, factors = np.tile(np.arange(4, dtype=np.uint8), (m, 1)), np.ones((m, 3), np.float32)
        flip, grayscale, solarize = np.zeros((3, m), np.bool_)
        hue, blur_sigma = np.zeros((2, m), np.float32)
        return cls(
            source=source, box=box, flip=flip, order=order, factors=factors, hue=hue, grayscale=grayscale, blur_sigma=blur_sigma,
            solarize=solarize,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """A batch of views."""

    rows: Rows  # [B] the images of the batch
    sizes_px: Mapping[str, int]  # side of each view, by its name, in the order of the crops
    crops: Crops  # B * V, view by view: view v of sample b is crop v * B + b
    # Whether the resize filter may read the source's pixels around a box, as when a whole image is resized and then cropped (evaluation);
    # False: the box is cut out first (training).
    beyond_box: bool = False

    def of_samples(self, kept: NDArray[np.bool_]) -> "ViewPlan":
        """The plan of the samples [B] that are kept."""
        crops = {name: values[np.tile(kept, len(self.sizes_px))] for name, values in vars(self.crops).items()}
        return replace(self, rows=self.rows[kept], crops=Crops(**crops))


def center_crops(rows: Rows, *, heights: Sides, widths: Sides, resize_px: int, crop_px: int) -> ViewPlan:
    """Resize the shorter side to `resize_px`, then the central `crop_px` square, without augmentation (torchvision's evaluation views)."""
    sides = np.stack([widths[rows], heights[rows]], axis=1).astype(np.int64)  # [B, 2]
    resized = resize_px * sides // sides.min(axis=1, keepdims=True)
    start = np.rint((resized - crop_px) / 2)
    box = np.concatenate([start, start + crop_px], axis=1) * np.tile(sides / resized, 2)
    return ViewPlan(rows=rows, sizes_px={"view": crop_px}, crops=Crops.plain(rows, box.astype(np.float32)), beyond_box=True)


def roi_crops(rows: Rows, boxes: NDArray[np.int16] | NDArray[np.float32], *, size_px: int) -> ViewPlan:
    """Each box [M, 4] of image rows[m], cut out and resized, without augmentation (RoI features)."""
    return ViewPlan(rows=rows, sizes_px={"view": size_px}, crops=Crops.plain(rows, np.asarray(boxes, np.float32)))


class ImageSource(Protocol):
    """Images by row: `ShardReader` (memory-mapped JPEGs), `PixelSource`, `PatchedSource`, or one of your own.

    `views` is called from several threads. It returns each row's encoded bytes, [size] uint8, or its pixels (`Decoded`), in the order asked
    for, without a copy where that is possible; they must stay valid as long as the arrays are held. An image that is missing or damaged may
    be any bytes: the renderer skips and counts what does not decode. `close` lets go of files and threads.
    """

    def views(self, rows: Rows, /) -> Sequence[AnyImage]: ...

    def close(self) -> None: ...


@runtime_checkable
class ReadsAhead(Protocol):
    """What an `ImageSource` has too if it can use the time until a plan is rendered."""

    def announce(self, plan: ViewPlan, /) -> None: ...


def needed_regions(plan: ViewPlan, places: Rows, num_sources: int) -> NDArray[np.int64]:
    """[num_sources, 4] int64 xyxy: what the crops, whose sources are at `places` [M], need of each source; may reach beyond the image."""
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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rendered views, without the samples of which an image could not be decoded."""

    views: dict[str, torch.Tensor]  # by the name of its ViewSpec, [B, 3, S, S] uint8 channels_last
    rows: Rows  # [B] the images rendered
    bad_rows: Rows  # the images left out because they, or their neighbor, could not be decoded
    bad_sources: Rows  # what could not be decoded: rows, and numbers of patches (see `Crops.source`)
    seconds: Mapping[str, float] = field(default_factory=dict)  # that each stage of rendering took, and waiting in the queue before it


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
