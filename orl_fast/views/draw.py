"""What is drawn for a view, as numba kernels: pure functions of (seed, epoch, image, stream); see `orl_fast.philox`.

Every draw has its own index within its stream, so nothing that is drawn depends on what else is drawn.
"""

from typing import NamedTuple

import numba as nb
import numpy as np

from orl_fast.config import ViewsConfig
from orl_fast.philox import uniform

# Streams: one per view, one per choice. They are part of the results: changing a number changes every view.
STREAMS = {"image": (1, 2), "intra": (3, 4), "inter": (5, 6)}  # of (first view, second view)
NEIGHBOR_STREAM, PAIR_STREAM, ROI_STREAM, ROI_JITTER_STREAM = 16, 17, 18, 19
_CROP_TRIES = 10
# Indices within a view's stream: 0 … 21 are the crop's.
_LEFT, _TOP, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER = 20, 21, 22, 23, 24, 25, 26, 27, 28  # order: 28 … 30
_GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = 31, 32, 33, 34


class Ranges(NamedTuple):
    """Probabilities and [low, high] ranges of one view's augmentations."""

    flip_prob: float
    jitter_prob: float
    brightness: tuple[float, float]
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: tuple[float, float]
    grayscale_prob: float
    blur_prob: float
    blur_sigma_px: tuple[float, float]
    solarize_prob: float

    @classmethod
    def of(cls, views: ViewsConfig, view: int) -> "Ranges":
        """The ranges of the first (0) or second (1) view."""
        around_1 = [(max(0.0, 1.0 - v), 1.0 + v) for v in (views.brightness, views.contrast, views.saturation)]
        return cls(
            flip_prob=views.flip_prob,
            jitter_prob=views.jitter_prob,
            brightness=around_1[0],
            contrast=around_1[1],
            saturation=around_1[2],
            hue=(-views.hue, views.hue),
            grayscale_prob=views.grayscale_prob,
            blur_prob=views.blur_prob[view],
            blur_sigma_px=views.blur_sigma_px,
            solarize_prob=views.solarize_prob[view],
        )


@nb.njit(cache=True, nogil=True)
def choices(seed, epoch, rows, stream, counts):  # type: ignore[no-untyped-def]
    """[B] int64: one uniform choice among 0 … counts[b] - 1 per image."""
    out = np.empty(len(rows), np.int64)
    for b in range(len(rows)):
        out[b] = np.int64(uniform(seed, epoch, rows[b], stream, 0) * counts[b])
    return out


@nb.njit(cache=True, nogil=True)
def random_resized_crops(seed, epoch, rows, stream, heights, widths, area, aspect, boxes):  # type: ignore[no-untyped-def]
    """Fill boxes [B, 4] as torchvision's RandomResizedCrop does: ten tries, log-uniform aspect, else the central crop."""
    log_low, log_high = np.log(aspect[0]), np.log(aspect[1])
    for b in range(len(rows)):
        height, width = heights[b], widths[b]
        w, h, left, top = 0, 0, 0, 0
        found = False
        for attempt in range(_CROP_TRIES):
            u = uniform(seed, epoch, rows[b], stream, 2 * attempt)
            v = uniform(seed, epoch, rows[b], stream, 2 * attempt + 1)
            target = height * width * (area[0] + u * (area[1] - area[0]))
            ratio = np.exp(log_low + v * (log_high - log_low))
            w, h = int(np.rint(np.sqrt(target * ratio))), int(np.rint(np.sqrt(target / ratio)))
            if 0 < w <= width and 0 < h <= height:
                left = int(uniform(seed, epoch, rows[b], stream, _LEFT) * (width - w + 1))
                top = int(uniform(seed, epoch, rows[b], stream, _TOP) * (height - h + 1))
                found = True
                break
        if not found:
            w, h = int(width), int(height)
            if width / height < aspect[0]:
                h = int(np.rint(w / aspect[0]))
            elif width / height > aspect[1]:
                w = int(np.rint(h * aspect[1]))
            left, top = (width - w) // 2, (height - h) // 2
        boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3] = left, top, left + w, top + h


@nb.njit(cache=True, nogil=True, inline="always")
def _between(seed, epoch, row, stream, index, limits):  # type: ignore[no-untyped-def]
    return limits[0] + uniform(seed, epoch, row, stream, index) * (limits[1] - limits[0])


@nb.njit(cache=True, nogil=True)
def augmentations(seed, epoch, rows, stream, ranges, flip, order, factors, hue, grayscale, sigma, solarize):  # type: ignore[no-untyped-def]
    """Fill one view's flips, color factors [B, 3] (brightness, contrast, saturation) and so on, as torchvision draws them."""
    for b in range(len(rows)):
        row = rows[b]
        flip[b] = uniform(seed, epoch, row, stream, _FLIP) < ranges.flip_prob
        for i in range(4):
            order[b, i] = i
        factors[b, :] = 1.0
        hue[b] = 0.0
        if uniform(seed, epoch, row, stream, _JITTER) < ranges.jitter_prob:
            factors[b, 0] = _between(seed, epoch, row, stream, _BRIGHTNESS, ranges.brightness)
            factors[b, 1] = _between(seed, epoch, row, stream, _CONTRAST, ranges.contrast)
            factors[b, 2] = _between(seed, epoch, row, stream, _SATURATION, ranges.saturation)
            hue[b] = _between(seed, epoch, row, stream, _HUE, ranges.hue)
            for i in range(3, 0, -1):  # Fisher and Yates
                j = int(uniform(seed, epoch, row, stream, _ORDER + 3 - i) * (i + 1))
                order[b, i], order[b, j] = order[b, j], order[b, i]
        grayscale[b] = uniform(seed, epoch, row, stream, _GRAYSCALE) < ranges.grayscale_prob
        sigma[b] = 0.0
        if uniform(seed, epoch, row, stream, _BLUR) < ranges.blur_prob:
            sigma[b] = _between(seed, epoch, row, stream, _SIGMA, ranges.blur_sigma_px)
        solarize[b] = uniform(seed, epoch, row, stream, _SOLARIZE) < ranges.solarize_prob
