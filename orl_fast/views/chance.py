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
from orl_fast.views.specs import Augmentation

# Streams of the choices that the views of a sample share; 0 is the sampler's, 1 to 15 are the views' own (`ViewSpec.stream`). They, and
# the order of the draws, are part of the results: changing one changes every view.
NEIGHBOR_STREAM, PAIR_STREAM, ROI_STREAM, ROI_JITTER_STREAM = 16, 17, 18, 19
_CROP_TRIES = 10
_LEFT, _TOP, _AUGMENTATIONS = 20, 21, slice(22, 35)  # indices within a view's stream; those before are the crop's tries


def choices(seed: int, epoch: int, rows: NDArray[np.int64], stream: int, counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """[B]: one uniform choice among 0 … counts[b] - 1 per image."""
    return np.asarray(_uniforms(seed, epoch, rows, np.full(len(rows), stream), 0, 1)[0] * counts, np.int64)


def augmentations(
    seed: int, epoch: int, rows: NDArray[np.int64], streams: Sequence[int], each: Sequence[Augmentation]
) -> dict[str, NDArray[Any]]:
    """Flips, color changes, blurs and so on of V views of each image, drawn as torchvision draws them; names and shapes as in `Crops`.

    Args:
        rows: [B], the images. streams, each: [V], the stream and the augmentation of each view.
    Returns:
        Arrays of M = V * B entries, view by view.
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
