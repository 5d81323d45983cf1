"""The second view of an RoI: a box near it (ORL, section 3.1, stage 3)."""

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from orl_fast.philox import uniform
from orl_fast.views.specs import JitteredRoi


def jitter_boxes(
    boxes: NDArray[np.integer[Any]],
    *,
    sizes: NDArray[np.int64],
    seed: int,
    epoch: int,
    images: NDArray[np.int64],
    stream: int,
    jitter: JitteredRoi,
) -> NDArray[np.int64]:
    """A box near each box: area, aspect (absolute) and center are drawn until it lies inside the image and overlaps the box enough.

    After `jitter.attempts` draws the box itself is returned.

    Args:
        boxes: [B, 4] integers, xyxy. sizes: [B, 2] int64, height and width of the images. images: [B] int64, their rows.
        seed, epoch, stream: what the draw is for (see `orl_fast.philox`).
    Returns:
        [B, 4] int64 xyxy.
    Raises:
        ValueError: the shapes differ from these.
    """
    if boxes.shape != (len(images), 4) or sizes.shape != (len(images), 2):
        raise ValueError(f"boxes {boxes.shape}, sizes {sizes.shape}; [B, 4] and [B, 2] are expected for {len(images)} images")
    limits = (jitter.shift, *jitter.area, *jitter.aspect, jitter.min_iou, jitter.attempts)
    return _jitter_kernel(boxes.astype(np.int64), sizes, seed, epoch, images, stream, limits)  # type: ignore[no-any-return]


@nb.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _reaches(inter, both, min_iou):  # type: ignore[no-untyped-def]
    """Whether boxes of areas `both` together overlap by more than min_iou, given their common area or a bound of it."""
    return min_iou < 0 or inter / (both - inter) > min_iou


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _jitter_kernel(boxes, sizes, seed, epoch, images, stream, limits):  # type: ignore[no-untyped-def]
    """See `jitter_boxes`. Four draws per attempt."""
    shift, area_lo, area_hi, aspect_lo, aspect_hi, min_iou, attempts = limits
    log_lo, log_hi = np.log(aspect_lo), np.log(aspect_hi)
    out = boxes.copy()
    for i in range(len(boxes)):
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        height, width, image = sizes[i, 0], sizes[i, 1], images[i]
        box_w, box_h = x2 - x1, y2 - y1
        area = np.float64(box_w * box_h)
        for attempt in range(attempts):
            # Draws are numbered, so a failed attempt skips the rest of its draws: most attempts end early.
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
