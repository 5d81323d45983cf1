"""Draws the plan of a batch from the views that a method asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import MissingStageError
from orl_fast.views import chance
from orl_fast.views.batch import Rows
from orl_fast.views.jitter import jitter_boxes
from orl_fast.views.mined import Mined
from orl_fast.views.patches import PATCH_SIDE_PX
from orl_fast.views.plan import Crops, ViewPlan
from orl_fast.views.specs import JitteredRoi, OwnRoi, PairQuery, RandomCrop, Source, ViewSpec

_Regions = tuple[Rows, NDArray[Any]]  # where to read a view of each sample: source [B], box [B, 4]


def draw_plan(
    rows: Rows,
    specs: Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    mined: Mined | None = None,
) -> ViewPlan:
    """Draw each view of each image (paper, section 3.3 and appendix A; see the sources in `orl_fast.views.specs`).

    Leaving a view out changes no other.

    Args:
        rows: [B] int64, the images.
        heights, widths: [N] int32, pixels of all images.
        mined: RoIs, pairs and patches, for views that are cut from RoIs.
    Raises:
        MissingStageError: such a view is asked for without them.
    """
    choices = _Choices(rows=rows, seed=seed, epoch=epoch, heights=heights, widths=widths, mined=mined)
    source, box = (np.concatenate(parts) for parts in zip(*(choices.regions(spec.source, spec.stream) for spec in specs), strict=True))
    drawn = chance.augmentations(seed, epoch, rows, [spec.stream for spec in specs], [spec.augmentation for spec in specs])
    crops = Crops(source=source, box=box.astype(np.float32), **drawn)
    return ViewPlan(rows=rows, sizes_px={spec.name: spec.size_px for spec in specs}, crops=crops)


@dataclass(kw_only=True)
class _Choices:
    """Where the views of a batch are cut from; they share the choices of an own RoI, a neighbor and a pair."""

    rows: Rows
    seed: int
    epoch: int
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    mined: Mined | None

    def regions(self, source: Source, stream: int) -> _Regions:
        rows = self.rows
        if isinstance(source, RandomCrop):
            sizes = self.heights[rows], self.widths[rows]
            return rows, chance.random_resized_crops(self.seed, self.epoch, rows, stream, *sizes, source.area, source.aspect)
        if self.mined is None:
            raise MissingStageError(f"{type(source).__name__}: this view is cut from mined RoIs or pairs; run orl-fast mine first")
        rois, pairs = self.mined.rois, self.mined.pairs
        if isinstance(source, OwnRoi):
            return rows, rois.boxes[self.own_roi]
        if isinstance(source, JitteredRoi):
            sizes_px = np.stack([self.heights[rows], self.widths[rows]], axis=1).astype(np.int64)
            return rows, jitter_boxes(
                rois.boxes[self.own_roi], sizes=sizes_px, seed=self.seed, epoch=self.epoch, images=rows, stream=chance.ROI_JITTER_STREAM,
                jitter=source,
            )  # fmt: skip
        neighbor, pair = self.pair
        if isinstance(source, PairQuery):
            return rows, rois.boxes[rois.offsets[rows] + pairs.query_roi[pair]]
        return self._partner(self.mined, neighbor, rois.offsets[neighbor] + pairs.partner_roi[pair])

    @cached_property
    def own_roi(self) -> Rows:
        """[B] rows of rois.boxes."""
        assert self.mined is not None
        offsets = self.mined.rois.offsets
        return offsets[self.rows] + self._choice(chance.ROI_STREAM, offsets[self.rows + 1] - offsets[self.rows])

    @cached_property
    def pair(self) -> tuple[Rows, Rows]:
        """[B] the neighbor's row, [B] the pair's."""
        assert self.mined is not None
        pairs = self.mined.pairs
        k = self._choice(chance.NEIGHBOR_STREAM, np.full(len(self.rows), pairs.neighbors.shape[1]))
        return pairs.neighbors[self.rows, k], pairs.first[self.rows, k] + self._choice(chance.PAIR_STREAM, pairs.count[self.rows, k])

    def _choice(self, stream: int, counts: NDArray[np.integer[Any]]) -> Rows:
        return chance.choices(self.seed, self.epoch, self.rows, stream, counts)

    def _partner(self, mined: Mined, neighbor: Rows, roi_row: Rows) -> _Regions:
        """In the neighbor, or in a stored patch."""
        box, patch_rows = mined.rois.boxes[roi_row], mined.patch_rows
        if not len(patch_rows):
            return neighbor, box
        patch = np.minimum(np.searchsorted(patch_rows, roi_row), len(patch_rows) - 1)
        stored = patch_rows[patch] == roi_row
        whole = [0, 0, PATCH_SIDE_PX, PATCH_SIDE_PX]
        return np.where(stored, len(self.heights) + patch, neighbor), np.where(stored[:, None], whole, box)
