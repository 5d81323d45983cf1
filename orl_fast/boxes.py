"""Box arithmetic and greedy filtering: numba kernels behind checked functions.

Boxes are xyxy, half-open, in pixels of the decoded image. Overlap is intersection / union: in float64 for `filter_proposals`, as the
reference computes it; in the boxes' own float type for `nms`, as torchvision does.
"""

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 16  # kept boxes compared at once: enough for vector registers, few enough to stop early


def pairwise_iou(a: ArrayLike, b: ArrayLike) -> NDArray[Any]:
    """Intersection over union of every box of `a`, [A, 4] xyxy, with every box of `b`, [B, 4] xyxy; 0 where both are empty.

    Returns [A, B] float64; float32 if both are float32. ValueError if an argument is not [?, 4].
    """
    first, second = _checked(a, "a"), _checked(b, "b")
    kind = np.float32 if first.dtype == second.dtype == np.float32 else np.float64
    left: NDArray[Any] = first.astype(kind)[:, None]  # [A, 1, 4]
    right: NDArray[Any] = second.astype(kind)  # [B, 4]
    sides = np.maximum(0, np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2]))  # [A, B, 2]
    inter = sides.prod(axis=-1)
    union = (left[..., 2:] - left[..., :2]).prod(axis=-1) + (right[..., 2:] - right[..., :2]).prod(axis=-1) - inter
    iou: NDArray[Any] = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return iou


def nms(boxes: ArrayLike, scores: ArrayLike, iou_threshold: float) -> NDArray[np.int64]:
    """Greedy non-maximum suppression, class-agnostic; the same rows in the same order as `torchvision.ops.nms`.

    Args:
        boxes: [P, 4] float32 or float64 xyxy (integers are taken as float32). scores: [P]; of equal ones the first row leads.
        iou_threshold: a box is dropped when it overlaps a kept one by more than this.
    Returns:
        [R] int64, the rows kept, by descending score. ValueError if boxes is not [P, 4] or scores is not [P].
    """
    rows = _checked(boxes, "boxes")
    rows = np.ascontiguousarray(rows, np.float64 if rows.dtype == np.float64 else np.float32)
    values = np.asarray(scores)
    if values.shape != rows.shape[:1]:
        raise ValueError(f"scores: shape {values.shape}, boxes has {len(rows)} rows; give one score per box")
    falling = -values if values.dtype.kind == "f" else -values.astype(np.int64)
    order = falling.argsort(kind="stable")
    if len(order) and falling[order[-1]] != falling[order[-1]]:  # NumPy sorts NaN last, torch first
        order = np.roll(order, np.isnan(falling).sum())
    nan = rows.dtype.type(np.nan)
    return _greedy(rows, order, nan, 0.0, 0.0, float(iou_threshold), len(rows))  # type: ignore[no-any-return]


def filter_proposals(
    boxes: ArrayLike, *, min_side_px: float = 96, max_aspect: float = 3.0, max_iou: float = 0.5, max_rois: int = 100
) -> NDArray[np.int64]:
    """Keep proposals greedily, in the proposer's order (ORL, section 3.1, stage 2 ii).

    A box is dropped if a side is under `min_side_px`, if width / height or height / width exceeds `max_aspect`, or if it overlaps
    a box kept before by more than `max_iou`. Empty boxes are always dropped.

    Args:
        boxes: [P, 4] xyxy, pixels; P >= 1.
    Returns:
        [R] int64, the rows kept, R <= max_rois; row 0 alone if none qualifies.
    Raises:
        ValueError: boxes is empty or not [P, 4], or max_rois < 1.
    """
    rows = _checked(boxes, "boxes")
    if not len(rows):
        raise ValueError("boxes: empty; give at least one box (the whole image where there is no proposal)")
    if max_rois < 1:
        raise ValueError(f"max_rois: {max_rois}; keep at least 1")
    return _filter_kernel(rows, float(min_side_px), float(max_aspect), float(max_iou), max_rois)  # type: ignore[no-any-return]


def _checked(boxes: ArrayLike, name: str) -> NDArray[Any]:
    rows = np.asarray(boxes)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise ValueError(f"{name}: shape {rows.shape}; boxes are [P, 4] xyxy")
    return rows


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _greedy(boxes, order, nan, min_side, max_aspect, max_iou, max_kept):  # type: ignore[no-untyped-def]
    """The rows kept of those in `order`, computed in the float type of `nan`; min_side 0 asks for neither sides nor aspect."""
    rows, num = np.empty(min(len(order), max_kept), np.int64), 0
    kept = np.full((5, len(rows) + _BLOCK), nan)  # x1, y1, x2, y2 and area; nothing overlaps an empty place
    kind = kept.dtype.type
    for row in order:
        x1, y1, x2, y2 = kind(boxes[row, 0]), kind(boxes[row, 1]), kind(boxes[row, 2]), kind(boxes[row, 3])
        w, h = x2 - x1, y2 - y1
        if min_side > 0 and (not (w >= min_side and h >= min_side) or w / h > max_aspect or h / w > max_aspect):
            continue
        if not _overlaps_kept(kept, num, x1, y1, x2, y2, w * h, max_iou):
            kept[0, num], kept[1, num], kept[2, num], kept[3, num], kept[4, num] = x1, y1, x2, y2, w * h
            rows[num] = row
            num += 1
            if num == len(rows):
                break
    return rows[:num]


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _overlaps_kept(kept, num, x1, y1, x2, y2, area, max_iou):  # type: ignore[no-untyped-def]
    """Whether a box overlaps one of the first `num` kept by more than max_iou. 0 / 0 counts as no overlap."""
    zero = kept.dtype.type(0)
    for start in range(0, num, _BLOCK):
        k_x1, k_y1 = kept[0, start : start + _BLOCK], kept[1, start : start + _BLOCK]
        k_x2, k_y2 = kept[2, start : start + _BLOCK], kept[3, start : start + _BLOCK]
        k_area = kept[4, start : start + _BLOCK]
        hits = 0
        for j in range(_BLOCK):  # of fixed length and without a branch, so that it runs in vector registers
            left = x1 if k_x1[j] < x1 else k_x1[j]
            top = y1 if k_y1[j] < y1 else k_y1[j]
            right = x2 if x2 < k_x2[j] else k_x2[j]
            bottom = y2 if y2 < k_y2[j] else k_y2[j]
            w = right - left if right - left > zero else zero
            h = bottom - top if bottom - top > zero else zero
            inter = w * h
            hits += inter / (k_area[j] + area - inter) > max_iou
        if hits > 0:
            return True
    return False


@nb.njit(cache=True, nogil=True)
def _filter_kernel(boxes, min_side, max_aspect, max_iou, max_rois):  # type: ignore[no-untyped-def]
    smallest = max(min_side, np.finfo(np.float64).tiny)  # empty boxes are never kept
    rows = _greedy(boxes, range(len(boxes)), np.nan, smallest, max_aspect, max_iou, max_rois)
    return rows if len(rows) > 0 else np.zeros(1, np.int64)
