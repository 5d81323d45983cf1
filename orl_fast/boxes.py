"""Box arithmetic and greedy filtering: numba kernels behind checked functions.

Boxes are xyxy, half-open, in pixels of the decoded image. Overlap is intersection / union: in float64 for RoI filtering and jitter, as
the reference computes it; in the boxes' own float type for `nms`, as torchvision does.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from orl_fast.config import Compat, ViewsConfig
from orl_fast.philox import uniform
from orl_fast.tables import BoxTable

_BLOCK = 16  # kept boxes compared at once: enough for vector registers, few enough to stop early
_MAX_PX = 32767  # what int16 holds; no box reaches beyond
_VIEWS = ViewsConfig()


def pairwise_iou(a: ArrayLike, b: ArrayLike) -> NDArray[Any]:
    """Intersection over union of every box of `a` with every box of `b`; 0 where both are empty.

    Args:
        a: [A, 4] xyxy. b: [B, 4] xyxy.
    Returns:
        [A, B] float64; float32 if both are float32.
    Raises:
        ValueError: an argument is not [?, 4].
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
        [R] int64, the rows kept, by descending score.
    Raises:
        ValueError: boxes is not [P, 4] or scores is not [P].
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
    return _nms_kernel(rows, order, float(iou_threshold))  # type: ignore[no-any-return]


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


def filter_table(
    proposals: BoxTable,
    *,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    min_side_px: float = 96,
    max_aspect: float = 3.0,
    max_iou: float = 0.5,
    max_rois: int = 100,
    num_threads: int = 1,
) -> BoxTable:
    """`filter_proposals` for every image of a table, in parallel threads.

    Boxes are clipped to their image first; an image without proposals gets one RoI, the whole image.

    Args:
        heights, widths: [N] int32, pixels.
    Returns:
        The RoIs, at least one per image.
    Raises:
        ValueError: heights or widths does not match the table, or max_rois < 1.
    """
    num_images = len(proposals)
    if not len(heights) == len(widths) == num_images:
        raise ValueError(f"heights, widths: {len(heights)}, {len(widths)} entries; the table has {num_images} images")
    if max_rois < 1:
        raise ValueError(f"max_rois: {max_rois}; keep at least 1")
    room = np.zeros(num_images + 1, np.int64)  # where image i's RoIs go before the gaps are closed
    np.cumsum(np.clip(proposals.counts, 1, max_rois), out=room[1:])
    out, counts = np.empty((room[-1], 4), np.int16), np.empty(num_images, np.int64)
    limits = (float(min_side_px), float(max_aspect), float(max_iou))
    arrays = (proposals.boxes, proposals.offsets, heights, widths, room, out, counts)
    edges = np.linspace(0, num_images, 4 * num_threads + 1).astype(np.int64)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda part: _filter_table_kernel(arrays, *limits, *part), pairwise(edges)))
    offsets = np.zeros(num_images + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    used = np.arange(room[-1]) - np.repeat(room[:-1], np.diff(room)) < np.repeat(counts, np.diff(room))
    return BoxTable(offsets=offsets, boxes=out[used])


def jitter_box(
    box: ArrayLike,
    *,
    height_px: int,
    width_px: int,
    seed: int,
    epoch: int = 0,
    image: int = 0,
    stream: int = 0,
    views: ViewsConfig = _VIEWS,
    compat: Compat = "official",
) -> NDArray[np.int64]:
    """A box near another: its second intra-RoI view (ORL, section 3.1, stage 3).

    Area, aspect (absolute) and center are drawn until the new box lies wholly inside the image and, with compat "official", overlaps
    the box by more than `views.roi_min_iou`; after `views.roi_attempts` tries the box itself is returned.

    Args:
        box: [4] integers, xyxy.
        seed, epoch, image, stream: what the draw is for (see `orl_fast.philox`).
        views: the roi_* ranges.
    Returns:
        [4] int64 xyxy.
    """
    boxes, sizes = np.asarray(box)[None], np.array([[height_px, width_px]])
    images, streams = np.array([image]), np.array([stream])
    jittered = jitter_boxes(boxes, sizes=sizes, seed=seed, epoch=epoch, images=images, streams=streams, views=views, compat=compat)
    return np.asarray(jittered[0])


def jitter_boxes(
    boxes: ArrayLike,
    *,
    sizes: NDArray[np.int64],
    seed: int,
    epoch: int,
    images: NDArray[np.int64],
    streams: NDArray[np.int64],
    views: ViewsConfig = _VIEWS,
    compat: Compat = "official",
) -> NDArray[np.int64]:
    """`jitter_box` for a batch.

    Args:
        boxes: [B, 4] integers. sizes: [B, 2] int64, height and width. images, streams: [B] int64.
    Returns:
        [B, 4] int64 xyxy.
    Raises:
        ValueError: the shapes differ from these.
    """
    rows = _checked(boxes, "boxes").astype(np.int64)
    if sizes.shape != (len(rows), 2) or images.shape != (len(rows),) or streams.shape != (len(rows),):
        raise ValueError(f"sizes {sizes.shape}, images {images.shape}, streams {streams.shape}; boxes has {len(rows)} rows")
    min_iou = views.roi_min_iou if compat == "official" else -1.0
    limits = (views.roi_shift, *views.roi_area, *views.roi_aspect, min_iou, views.roi_attempts)
    return _jitter_kernel(rows, sizes, seed, epoch, images, streams, limits)  # type: ignore[no-any-return]


@nb.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _reaches(inter, both, min_iou):  # type: ignore[no-untyped-def]
    """Whether boxes of areas `both` together overlap by more than min_iou, given their common area or a bound of it."""
    return min_iou < 0 or inter / (both - inter) > min_iou


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _jitter_kernel(boxes, sizes, seed, epoch, images, streams, limits):  # type: ignore[no-untyped-def]
    """See `jitter_box`; min_iou < 0: overlap is not asked for. Four draws per attempt."""
    shift, area_lo, area_hi, aspect_lo, aspect_hi, min_iou, attempts = limits
    log_lo, log_hi = np.log(aspect_lo), np.log(aspect_hi)
    out = boxes.copy()
    for i in range(len(boxes)):
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        height, width, image, stream = sizes[i, 0], sizes[i, 1], images[i], streams[i]
        box_w, box_h = x2 - x1, y2 - y1
        area = np.float64(box_w * box_h)
        for attempt in range(attempts):
            # Draws are numbered, so those of an attempt that has failed already need not be made: most attempts end early.
            new_area = area * (area_lo + (area_hi - area_lo) * uniform(seed, epoch, image, stream, 4 * attempt))
            aspect = np.exp(log_lo + (log_hi - log_lo) * uniform(seed, epoch, image, stream, 4 * attempt + 1))
            w, h = np.int64(np.rint(np.sqrt(new_area * aspect))), np.int64(np.rint(np.sqrt(new_area / aspect)))
            both, common_w, common_h = box_w * box_h + w * h, min(w, box_w), min(h, box_h)
            if w < 1 or h < 1 or w > width or h > height or not _reaches(common_w * common_h, both, min_iou):
                continue
            center_x = x1 + 0.5 * box_w + shift * (2 * uniform(seed, epoch, image, stream, 4 * attempt + 2) - 1) * box_w
            x = np.int64(np.rint(center_x - 0.5 * w))
            common_w = max(0, min(x2, x + w) - max(x1, x))
            if x < 0 or x + w > width or not _reaches(common_w * common_h, both, min_iou):
                continue
            center_y = y1 + 0.5 * box_h + shift * (2 * uniform(seed, epoch, image, stream, 4 * attempt + 3) - 1) * box_h
            y = np.int64(np.rint(center_y - 0.5 * h))
            common_h = max(0, min(y2, y + h) - max(y1, y))
            if y >= 0 and y + h <= height and _reaches(common_w * common_h, both, min_iou):
                out[i, 0], out[i, 1], out[i, 2], out[i, 3] = x, y, x + w, y + h
                break
    return out


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
def _nms_kernel(boxes, order, max_iou):  # type: ignore[no-untyped-def]
    return _greedy(boxes, order, boxes.dtype.type(np.nan), 0.0, 0.0, max_iou, len(order))


@nb.njit(cache=True, nogil=True)
def _filter_kernel(boxes, min_side, max_aspect, max_iou, max_rois):  # type: ignore[no-untyped-def]
    smallest = max(min_side, np.finfo(np.float64).tiny)  # empty boxes are never kept
    rows = _greedy(boxes, range(len(boxes)), np.nan, smallest, max_aspect, max_iou, max_rois)
    return rows if len(rows) > 0 else np.zeros(1, np.int64)


@nb.njit(cache=True, nogil=True)
def _filter_table_kernel(arrays, min_side, max_aspect, max_iou, start, stop):  # type: ignore[no-untyped-def]
    """Filter images start … stop - 1: image i's RoIs go to out[room[i]:], their number to counts[i]."""
    boxes, offsets, heights, widths, room, out, counts = arrays
    for image in range(start, stop):
        width, height = min(widths[image], _MAX_PX), min(heights[image], _MAX_PX)
        found = boxes[offsets[image] : offsets[image + 1]]
        if len(found) > 0:
            clipped = np.minimum(np.maximum(found, 0), np.array([width, height, width, height]))
        else:
            clipped = np.array([[0, 0, width, height]])
        rows = _filter_kernel(clipped, min_side, max_aspect, max_iou, room[image + 1] - room[image])
        counts[image] = len(rows)
        for i in range(len(rows)):
            out[room[image] + i] = clipped[rows[i]]
