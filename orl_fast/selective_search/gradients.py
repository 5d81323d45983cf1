"""Derivatives along the axes and the diagonals, as OpenCV computes them for selective search's texture.

The diagonal ones are Scharr derivatives of the plane rotated by 45 degrees and rounded to uint8, rotated back about a whole pixel and
cropped by half the difference in size, both ways bilinear with zeros outside. OpenCV rotates the whole bounding box back, twice the image;
here cv2.remap samples the image's part alone, at coordinates rounded as cv2.warpAffine rounds them: the values are equal to the last bit.
"""

import cv2
import numba as nb
import numpy as np

from orl_fast.selective_search.scratch import Array, Scratch


def derivatives(image: Array, scratch: Scratch) -> list[Array]:
    """Four planes [H, 3 W] of an image [H, W, 3] uint8, channels interleaved: dx, dy (int16) and both diagonals (float32)."""
    height, width = image.shape[:2]
    center = (width / 2, height / 2)
    box = cv2.RotatedRect(center, (width, height), 45.0).boundingRect()[2:]
    rotation = cv2.getRotationMatrix2D(center, 45.0, 1.0)
    rotation[:, 2] += (box[0] / 2 - center[0], box[1] / 2 - center[1])
    rotated = cv2.warpAffine(image, rotation, box, dst=scratch.take("rotated image", (box[1], box[0], 3), np.uint8))
    back = cv2.invertAffineTransform(cv2.getRotationMatrix2D((box[0] // 2, box[1] // 2), -45.0, 1.0)).astype(np.float32)
    # A narrow image is longer than its rotated bounding box: OpenCV starts at 0 there.
    left, top = max(0, box[0] - width) // 2, max(0, box[1] - height) // 2
    starts = np.arange(top, top + height, dtype=np.float32)[:, None] * back[:, 1] + back[:, 2]
    steps = np.arange(left, left + width)[:, None] * back[:, 0].astype(np.float64)  # the sums are rounded once, as by fused multiply-add
    source_x, source_y = (scratch.take(f"source {axis}", (height, width), np.float32) for axis in (0, 1))
    np.add(starts[:, None, 0], steps[:, 0], out=source_x, casting="same_kind")
    np.add(starts[:, None, 1], steps[:, 1], out=source_y, casting="same_kind")
    planes = [_scharr(image, axis, cv2.CV_16S, scratch.take(f"straight {axis}", image.shape, np.int16)) for axis in (0, 1)]
    for axis in (0, 1):
        derivative = _scharr(rotated, axis, cv2.CV_32F, scratch.take("rotated derivative", rotated.shape, np.float32))
        out = scratch.take(f"diagonal {axis}", image.shape, np.float32)
        planes.append(cv2.remap(derivative, source_x, source_y, cv2.INTER_LINEAR, dst=out))
    return [plane.reshape(height, 3 * width) for plane in planes]


def _scharr(image: Array, axis: int, depth: int, out: Array) -> Array:
    return np.asarray(cv2.Scharr(image, depth, 1 - axis, axis, dst=out))


@nb.njit(cache=True, nogil=True)
def extrema(plane: Array) -> tuple[Array, Array]:
    """Minimum and maximum [3] of each channel of an interleaved plane [H, 3 W]."""
    low, high = plane[0].copy(), plane[0].copy()
    for y in range(1, len(plane)):
        row = plane[y]
        for i in range(len(row)):
            low[i] = row[i] if row[i] < low[i] else low[i]
            high[i] = row[i] if row[i] > high[i] else high[i]
    least, most = np.empty(3, np.float64), np.empty(3, np.float64)
    for c in range(3):
        least[c], most[c] = low[c::3].min(), high[c::3].max()
    return least, most
