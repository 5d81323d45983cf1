"""The random draws of views: pure functions of (seed, epoch, image, stream); see `orl_fast.philox`.

Every draw has its own index within its stream, so nothing that is drawn depends on what else is drawn.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from orl_fast.philox import uniform
from orl_fast.views.plan import Rows
from orl_fast.views.specs import Augmentation, JitteredRoi

# Streams of the choices that the views of a sample share; 0 is the sampler's, 1 to 15 are the views' own (`ViewSpec.stream`). They, and
# the order of the draws, are part of the results: changing one changes every view.
NEIGHBOR_STREAM, PAIR_STREAM, ROI_STREAM, ROI_JITTER_STREAM, LIGHTING_STREAM = 16, 17, 18, 19, 20
_CROP_TRIES = 10
_LEFT, _TOP, _AUGMENTATIONS = 20, 21, slice(22, 35)  # indices within a view's stream; those before are the crop's tries


def choices(seed: int, epoch: int, rows: Rows, stream: int, counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """[B]: one uniform choice among 0 … counts[b] - 1 per image."""
    return np.asarray(_uniforms(seed, epoch, rows, np.full(len(rows), stream), 0, 1)[0] * counts, np.int64)


def augmentations(seed: int, epoch: int, rows: Rows, streams: Sequence[int], each: Sequence[Augmentation]) -> dict[str, NDArray[Any]]:
    """Flips, color changes, blurs and so on of views of each image, drawn as torchvision draws them; names and shapes as in `Crops`.

    Streams and augmentations are given for each of V views; the arrays hold M = V * B entries, view by view.
    """
    num = len(rows)
    a = {field.name: np.repeat(np.array([getattr(one, field.name) for one in each]), num, axis=0) for field in fields(Augmentation)}
    draws = _uniforms(seed, epoch, np.tile(rows, len(each)), np.repeat(streams, num), _AUGMENTATIONS.start, _AUGMENTATIONS.stop)
    flip, jitter, brightness, contrast, saturation, hue, *swaps, grayscale, blur, sigma, solarize = draws
    jittered = jitter < a["jitter_prob"]
    strengths = np.stack([a["brightness"], a["contrast"], a["saturation"]], axis=1)
    factors = _between(np.stack([brightness, contrast, saturation], axis=1), np.maximum(0, 1 - strengths), 1 + strengths)
    order, place = np.tile(np.arange(4, dtype=np.uint8), (len(flip), 1)), np.arange(len(flip))
    for i, swap in zip((3, 2, 1), swaps, strict=True):  # Fisher and Yates
        j = np.where(jittered, swap * (i + 1), i).astype(np.int64)
        order[place, i], order[place, j] = order[place, j], order[place, i]
    return {
        "flip": flip < a["flip_prob"],
        "order": order,
        "factors": np.where(jittered[:, None], factors, 1).astype(np.float32),
        "hue": np.where(jittered, _between(hue, -a["hue"], a["hue"]), 0).astype(np.float32),
        "grayscale": grayscale < a["grayscale_prob"],
        "blur_sigma": np.where(blur < a["blur_prob"], _between(sigma, *a["blur_sigma_px"].T), 0).astype(np.float32),
        "solarize": solarize < a["solarize_prob"],
    }


def normals(seed: int, epoch: int, rows: Rows, stream: int, count: int) -> NDArray[np.float64]:
    """[B, count]: standard normal draws of each image (Box and Muller)."""
    radius, turns = _uniforms(seed, epoch, rows, np.full(len(rows), stream), 0, 2 * count).reshape(2, count, len(rows))
    return np.asarray(np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * turns)).T


def _between(draws: NDArray[np.float64], low: Any, high: Any) -> NDArray[np.float64]:
    return np.asarray(low + draws * (high - low))


@nb.njit(cache=True, nogil=True)
def _uniforms(seed, epoch, rows, streams, start, stop):  # type: ignore[no-untyped-def]
    """[stop - start, M]: the draws from index `start` on, for each row and its stream."""
    out = np.empty((stop - start, len(rows)))
    for m in range(len(rows)):
        for index in range(start, stop):
            out[index - start, m] = uniform(seed, epoch, rows[m], streams[m], index)
    return out


@nb.njit(cache=True, nogil=True)
def random_resized_crops(seed, epoch, rows, stream, heights, widths, area, aspect):  # type: ignore[no-untyped-def]
    """[B, 4] float32 boxes as torchvision's RandomResizedCrop draws them: ten tries, log-uniform aspect, else the central crop."""
    log_low, log_high = np.log(aspect[0]), np.log(aspect[1])
    boxes = np.empty((len(rows), 4), np.float32)
    for b in range(len(rows)):
        row, height, width = rows[b], int(heights[b]), int(widths[b])
        for attempt in range(_CROP_TRIES):
            u, v = uniform(seed, epoch, row, stream, 2 * attempt), uniform(seed, epoch, row, stream, 2 * attempt + 1)
            target = height * width * (area[0] + u * (area[1] - area[0]))
            ratio = np.exp(log_low + v * (log_high - log_low))
            w, h = int(np.rint(np.sqrt(target * ratio))), int(np.rint(np.sqrt(target / ratio)))
            if 0 < w <= width and 0 < h <= height:
                left = int(uniform(seed, epoch, row, stream, _LEFT) * (width - w + 1))
                top = int(uniform(seed, epoch, row, stream, _TOP) * (height - h + 1))
                break
        else:
            w = min(width, int(np.rint(height * aspect[1])))
            h = min(height, int(np.rint(width / aspect[0])))
            left, top = (width - w) // 2, (height - h) // 2
        boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3] = left, top, left + w, top + h
    return boxes


def jitter_boxes(
    boxes: NDArray[np.integer[Any]], *, sizes: NDArray[np.int64], seed: int, epoch: int, images: Rows, stream: int, jitter: JitteredRoi
) -> NDArray[np.int64]:
    """[B, 4] int64 xyxy: the second view of an RoI, a box near each of boxes [B, 4] (ORL, section 3.1, stage 3).

    Area, aspect (absolute) and center are drawn until the new box lies inside its image (height and width: sizes [B, 2]) and overlaps the
    box enough; after `jitter.attempts` draws it is the box itself. ValueError: the shapes differ from these.
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
