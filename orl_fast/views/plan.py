"""What to render: a `ViewPlan` holds every parameter of a batch of views, drawn by pure functions of (seed, epoch, image, stream).

"Draw on the host, render on the device": renderers execute a plan and hold no randomness. So any step of any epoch can be drawn alone,
by any rank or thread, and two renderers can be compared on the same views.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orl_fast.views.batch import Rows


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
    sizes_px: Mapping[str, int]  # side of each view, by its name, in the order of the crops
    crops: Crops  # B * V, view by view: view v of sample b is crop v * B + b
    beyond_box: bool = False

    def of_samples(self, kept: NDArray[np.bool_]) -> "ViewPlan":
        """The plan of the samples [B] that are kept."""
        crops = {name: values[np.tile(kept, len(self.sizes_px))] for name, values in vars(self.crops).items()}
        return ViewPlan(rows=self.rows[kept], sizes_px=self.sizes_px, crops=Crops(**crops), beyond_box=self.beyond_box)


def center_crops(rows: Rows, *, heights: NDArray[np.int32], widths: NDArray[np.int32], resize_px: int, crop_px: int) -> ViewPlan:
    """Resize the shorter side to `resize_px`, then the central `crop_px` square, without augmentation (torchvision's evaluation views).

    Args:
        rows: [B] int64. heights, widths: [N] int32, pixels of all images.
    """
    sides = np.stack([widths[rows], heights[rows]], axis=1).astype(np.int64)  # [B, 2]
    resized = resize_px * sides // sides.min(axis=1, keepdims=True)
    start = np.rint((resized - crop_px) / 2)
    box = np.concatenate([start, start + crop_px], axis=1) * np.tile(sides / resized, 2)
    return ViewPlan(rows=rows, sizes_px={"view": crop_px}, crops=Crops.plain(rows, box.astype(np.float32)), beyond_box=True)


def roi_crops(rows: Rows, boxes: NDArray[np.int16] | NDArray[np.float32], *, size_px: int) -> ViewPlan:
    """Each box [M, 4] of image rows[m], cut out and resized, without augmentation (RoI features)."""
    return ViewPlan(rows=rows, sizes_px={"view": size_px}, crops=Crops.plain(rows, np.asarray(boxes, np.float32)))
