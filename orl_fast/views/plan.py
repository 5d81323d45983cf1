"""What to render: a `ViewPlan` holds every parameter of a batch of views, drawn by pure functions of (seed, epoch, image, view).

"Draw on the host, render on the device": renderers execute a plan and hold no randomness. Hence any step of any epoch can be drawn alone,
by any rank or thread, and two renderers can be compared on the same views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orl_fast.boxes import jitter_boxes
from orl_fast.config import Compat, ViewsConfig
from orl_fast.tables import PairTable, RoiTable
from orl_fast.views import draw

Rows = NDArray[np.int64]
TERMS = ("image", "intra", "inter")
PATCH_SIDE_PX = 128  # of stored partner patches
_Boxes = dict[tuple[str, int], tuple[Rows, NDArray[Any]]]  # by term and view, where to read: source [B], box [B, 4]


class Slot(NamedTuple):
    """One view of each sample: a term of the loss ("image", "intra", "inter"), which of its two views, and its size."""

    term: str
    view: int
    size_px: int


@dataclass(frozen=True, kw_only=True)
class Crops:
    """M crops: cut out the box, resize it (bilinear, antialiased), flip, change colors in `order`, grayscale, blur, solarize."""

    source: NDArray[np.int64]  # [M] row of the image read from; from N on: number of a stored partner patch, plus N
    box: NDArray[np.float32]  # [M, 4] xyxy, pixels of the source
    flip: NDArray[np.bool_]  # [M]
    order: NDArray[np.uint8]  # [M, 4] a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    factors: NDArray[np.float32]  # [M, 3] of brightness, contrast and saturation; 1: unchanged
    hue: NDArray[np.float32]  # [M] turns; 0: unchanged
    grayscale: NDArray[np.bool_]  # [M]
    blur_sigma: NDArray[np.float32]  # [M] pixels of the view; 0: none
    solarize: NDArray[np.bool_]  # [M] values from 128 on are inverted

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def plain(cls, source: Rows, box: NDArray[np.float32]) -> "Crops":
        """Crops that are resized and otherwise left alone."""
        m = len(source)
        return cls(
            source=source,
            box=box,
            flip=np.zeros(m, np.bool_),
            order=np.tile(np.arange(4, dtype=np.uint8), (m, 1)),
            factors=np.ones((m, 3), np.float32),
            hue=np.zeros(m, np.float32),
            grayscale=np.zeros(m, np.bool_),
            blur_sigma=np.zeros(m, np.float32),
            solarize=np.zeros(m, np.bool_),
        )


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """A batch of views.

    `beyond_box`: the resize filter may read the source's pixels around a box, as when a whole image is resized and then cropped
    (evaluation); False: the box is cut out first (training).
    """

    rows: Rows  # [B] the images of the batch
    slots: tuple[Slot, ...]  # what is rendered of each
    crops: Crops  # B * len(slots), slot by slot: view v of sample b is crop v * B + b
    beyond_box: bool = False


def draw_byol(rows: Rows, *, seed: int, epoch: int, heights: NDArray[np.int32], widths: NDArray[np.int32], views: ViewsConfig) -> ViewPlan:
    """Two random resized crops of each image (paper, appendix A; BYOL's augmentations).

    Args:
        rows: [B] int64.
        heights, widths: [N] int32, pixels of all images.
    """
    return _plan(rows, _image_boxes(rows, seed, epoch, heights, widths, views), seed=seed, epoch=epoch, views=views)


def draw_orl(
    rows: Rows,
    *,
    seed: int,
    epoch: int,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    views: ViewsConfig,
    rois: RoiTable,
    pairs: PairTable,
    terms: Sequence[str] = TERMS,
    compat: Compat = "official",
    patch_rows: NDArray[np.int64] | None = None,
) -> ViewPlan:
    """Image, intra-RoI and inter-RoI views (paper, section 3.3): a uniform neighbor, one of its pairs, one own RoI.

    Args:
        rows … views: as for `draw_byol`.
        pairs: already limited to the neighbors and the ratio in use (`PairTable.limited`).
        terms: what is drawn; leaving a term out does not change the others.
        patch_rows: [P] int64, sorted: the RoIs (rows of rois.boxes) of which a patch is stored; partners are read from there.
    """
    boxes: _Boxes = {}
    first = rois.offsets[rows]
    if "image" in terms:
        boxes |= _image_boxes(rows, seed, epoch, heights, widths, views)
    if "intra" in terms:
        own = rois.boxes[first + draw.choices(seed, epoch, rows, draw.ROI_STREAM, rois.offsets[rows + 1] - first)]
        sizes = np.stack([heights[rows], widths[rows]], axis=1).astype(np.int64)
        streams = np.full(len(rows), draw.ROI_JITTER_STREAM, np.int64)
        moved = jitter_boxes(own, sizes=sizes, seed=seed, epoch=epoch, images=rows, streams=streams, views=views, compat=compat)
        boxes |= {("intra", 0): (rows, own), ("intra", 1): (rows, moved)}
    if "inter" in terms:
        k = draw.choices(seed, epoch, rows, draw.NEIGHBOR_STREAM, np.full(len(rows), pairs.neighbors.shape[1]))
        neighbor = pairs.neighbors[rows, k]
        pair = pairs.first[rows, k] + draw.choices(seed, epoch, rows, draw.PAIR_STREAM, pairs.count[rows, k])
        partner_row = rois.offsets[neighbor] + pairs.partner_roi[pair]
        boxes["inter", 0] = rows, rois.boxes[first + pairs.query_roi[pair]]
        boxes["inter", 1] = _partner_boxes(neighbor, partner_row, rois, patch_rows, num_images=len(heights))
    return _plan(rows, boxes, seed=seed, epoch=epoch, views=views)


def center_crops(rows: Rows, *, heights: NDArray[np.int32], widths: NDArray[np.int32], resize_px: int, crop_px: int) -> ViewPlan:
    """Resize the shorter side to `resize_px`, then the central `crop_px` square, without augmentation (torchvision's evaluation views)."""
    sides = np.stack([widths[rows], heights[rows]], axis=1).astype(np.int64)  # [B, 2]
    resized = resize_px * sides // sides.min(axis=1, keepdims=True)
    start = np.rint((resized - crop_px) / 2)
    box = np.concatenate([start, start + crop_px], axis=1) * np.tile(sides / resized, 2)
    return ViewPlan(rows=rows, slots=(Slot("image", 0, crop_px),), crops=Crops.plain(rows, box.astype(np.float32)), beyond_box=True)


def roi_crops(rows: Rows, boxes: NDArray[np.int16] | NDArray[np.float32], *, size_px: int) -> ViewPlan:
    """Each box [M, 4] of image rows[m], cut out and resized, without augmentation (RoI features)."""
    return ViewPlan(rows=rows, slots=(Slot("image", 0, size_px),), crops=Crops.plain(rows, np.asarray(boxes, np.float32)))


def _image_boxes(rows: Rows, seed: int, epoch: int, heights: NDArray[np.int32], widths: NDArray[np.int32], views: ViewsConfig) -> _Boxes:
    ranges = views.crop_area, views.crop_aspect
    return {
        ("image", view): (rows, draw.random_resized_crops(seed, epoch, rows, stream, heights[rows], widths[rows], *ranges))
        for view, stream in enumerate(draw.STREAMS["image"])
    }


def _partner_boxes(
    neighbor: Rows, roi_row: Rows, rois: RoiTable, patch_rows: NDArray[np.int64] | None, *, num_images: int
) -> tuple[Rows, NDArray[Any]]:
    """Where to read the partner RoIs: in the neighbor, or in a stored patch."""
    box = rois.boxes[roi_row]
    if patch_rows is None or not len(patch_rows):
        return neighbor, box
    patch = np.minimum(np.searchsorted(patch_rows, roi_row), len(patch_rows) - 1)
    stored = patch_rows[patch] == roi_row
    return np.where(stored, num_images + patch, neighbor), np.where(stored[:, None], [0, 0, PATCH_SIDE_PX, PATCH_SIDE_PX], box)


def _plan(rows: Rows, boxes: _Boxes, *, seed: int, epoch: int, views: ViewsConfig) -> ViewPlan:
    """Draw the augmentations of all views, joined slot by slot."""
    slots = tuple(Slot(term, view, views.image_size_px if term == "image" else views.patch_size_px) for term, view in boxes)
    source, box = (np.concatenate(parts) for parts in zip(*boxes.values(), strict=True))
    streams = np.repeat([draw.STREAMS[term][view] for term, view in boxes], len(rows))
    second = np.repeat([view for _, view in boxes], len(rows))
    drawn = draw.augmentations(seed, epoch, np.tile(rows, len(slots)), streams, second, views)
    return ViewPlan(rows=rows, slots=slots, crops=Crops(source=source, box=box.astype(np.float32), **drawn))
