"""Draws the plan of a batch from the views that a method asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import MissingStageError
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views import chance
from orl_fast.views.patches import PATCH_SIDE_PX, PatchStore
from orl_fast.views.plan import Crops, Rows, Sides, ViewPlan
from orl_fast.views.specs import JitteredRoi, OwnRoi, PairQuery, RandomCrop, ViewSpec


@dataclass(frozen=True, kw_only=True)
class Mined:
    """The results of stage 2 that views are cut from: RoIs and pairs, and partner patches where they were packed."""

    rois: BoxTable
    pairs: PairTable  # already limited to the neighbors and the ratio in use (`PairTable.limited`)
    patches: PatchStore | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of the tables, by name

    @property
    def patch_rows(self) -> Rows:
        """[P] int64, sorted: the RoIs (rows of rois.boxes) of which a patch is stored; partners are read from there."""
        return self.patches.rows if self.patches is not None else np.empty(0, np.int64)


def draw_plan(
    rows: Rows, specs: Sequence[ViewSpec], *, seed: int, epoch: int, heights: Sides, widths: Sides, mined: Mined | None = None
) -> ViewPlan:
    """Draw each view of each image (paper, section 3.3 and appendix A; see the sources in `orl_fast.views.specs`).

    Leaving a view out changes no other. MissingStageError: a view is cut from RoIs, and `mined` is None.
    """

    def choice(stream: int, counts: NDArray[np.integer[Any]]) -> Rows:
        return chance.choices(seed, epoch, rows, stream, counts)

    def region(spec: ViewSpec) -> tuple[Rows, NDArray[Any]]:
        """Where to read the view: source [B], box [B, 4]. What views share (RoI, neighbor, pair) is drawn again, and comes out the same."""
        if isinstance(spec.source, RandomCrop):
            sizes = heights[rows], widths[rows]
            return rows, chance.random_resized_crops(seed, epoch, rows, spec.stream, *sizes, spec.source.area, spec.source.aspect)
        if mined is None:
            raise MissingStageError(f"{type(spec.source).__name__}: this view is cut from mined RoIs or pairs; run orl-fast mine first")
        boxes, offsets, pairs = mined.rois.boxes, mined.rois.offsets, mined.pairs
        if isinstance(spec.source, OwnRoi | JitteredRoi):
            own = boxes[offsets[rows] + choice(chance.ROI_STREAM, offsets[rows + 1] - offsets[rows])]
            if isinstance(spec.source, OwnRoi):
                return rows, own
            sizes_px, stream = np.stack([heights[rows], widths[rows]], axis=1).astype(np.int64), chance.ROI_JITTER_STREAM
            return rows, chance.jitter_boxes(own, sizes=sizes_px, seed=seed, epoch=epoch, images=rows, stream=stream, jitter=spec.source)
        k = choice(chance.NEIGHBOR_STREAM, np.full(len(rows), pairs.neighbors.shape[1]))
        pair = pairs.first[rows, k] + choice(chance.PAIR_STREAM, pairs.count[rows, k])
        if isinstance(spec.source, PairQuery):
            return rows, boxes[offsets[rows] + pairs.query_roi[pair]]
        neighbor = pairs.neighbors[rows, k]
        roi, patch_rows = offsets[neighbor] + pairs.partner_roi[pair], mined.patch_rows
        if not len(patch_rows):
            return neighbor, boxes[roi]
        patch = np.minimum(np.searchsorted(patch_rows, roi), len(patch_rows) - 1)
        stored, whole = patch_rows[patch] == roi, [0, 0, PATCH_SIDE_PX, PATCH_SIDE_PX]
        return np.where(stored, len(heights) + patch, neighbor), np.where(stored[:, None], whole, boxes[roi])

    source, box = (np.concatenate(parts) for parts in zip(*map(region, specs), strict=True))
    drawn = chance.augmentations(seed, epoch, rows, [spec.stream for spec in specs], [spec.augmentation for spec in specs])
    crops = Crops(source=source, box=box.astype(np.float32), **drawn)
    return ViewPlan(rows=rows, sizes_px={spec.name: spec.size_px for spec in specs}, crops=crops)
