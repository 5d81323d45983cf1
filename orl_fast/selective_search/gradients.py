"""Derivatives along the axes and the diagonals, as OpenCV computes them for selective search's texture.

The diagonal ones are Scharr derivatives of the plane rotated by 45 degrees and rounded to uint8, rotated back about a whole pixel and
cropped by half the difference in size, both ways bilinear with zeros outside. Rotating back is done here: cv2.warpAffine would rotate the
whole bounding box, twice the image. The same operations in the same order, fused where OpenCV fuses, give values equal to the last bit.
"""

import cv2
import numba as nb
import numpy as np
from numba import float32, int64, uint64

from orl_fast.selective_search.scratch import Array, Scratch


def derivatives(image: Array, scratch: Scratch) -> list[Array]:
    """Four planes [H, 3 W] of an image [H, W, 3] uint8, channels interleaved: dx, dy (int16) and both diagonals (float32)."""
    height, width = image.shape[:2]
    planes = [_scharr(image, axis, f"straight {axis}", scratch).reshape(height, 3 * width) for axis in (0, 1)]
    center = (width / 2, height / 2)
    rotated_width, rotated_height = cv2.RotatedRect(center, (width, height), 45.0).boundingRect()[2:]
    rotation = cv2.getRotationMatrix2D(center, 45.0, 1.0)
    rotation[:, 2] += (rotated_width / 2 - center[0], rotated_height / 2 - center[1])
    rotated = scratch.take("rotated image", (rotated_height, rotated_width, 3), np.uint8)
    rotated = cv2.warpAffine(image, rotation, (rotated_width, rotated_height), dst=rotated)
    back = cv2.invertAffineTransform(cv2.getRotationMatrix2D((rotated_width // 2, rotated_height // 2), -45.0, 1.0)).astype(np.float32)
    # A narrow image is longer than its rotated bounding box: OpenCV starts at 0 there.
    left, top = max(0, rotated_width - width) // 2, max(0, rotated_height - height) // 2
    rows = np.arange(top, top + height, dtype=np.float32)[:, None]
    starts = rows * back[:, 1] + back[:, 2]  # here, not in the kernel: OpenCV rounds between these two operations
    diagonals = [scratch.take(f"diagonal {axis}", (height, 3 * width), np.float32) for axis in (0, 1)]
    dx, dy = (_scharr(rotated, axis, f"rotated {axis}", scratch) for axis in (0, 1))
    _rotate_back(dx, dy, back, starts, left, *diagonals)
    return planes + diagonals


def _scharr(image: Array, axis: int, name: str, scratch: Scratch) -> Array:
    out = scratch.take(name, image.shape, np.int16)
    return np.asarray(cv2.Scharr(image, cv2.CV_16S, 1 - axis, axis, dst=out))


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


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _rotate_back(dx: Array, dy: Array, matrix: Array, starts: Array, left: int, out_x: Array, out_y: Array) -> None:
    """Sample two planes [H', W', 3] int16 at the rotated pixels of the outputs [H, 3 W]."""
    rotated_height, rotated_width, _ = dx.shape
    flat_x, flat_y, right, down = dx.reshape(-1), dy.reshape(-1), uint64(3), uint64(3 * rotated_width)
    step_x, step_y = matrix[0, 0], matrix[1, 0]
    for y in range(len(starts)):
        start_x, start_y = starts[y, 0], starts[y, 1]
        row_x, row_y = out_x[y], out_y[y]
        for x in range(len(row_x) // 3):
            source_x, source_y = float32(x + left) * step_x + start_x, float32(x + left) * step_y + start_y
            floor_x, floor_y = np.floor(source_x), np.floor(source_y)
            u, v, ix, iy = source_x - floor_x, source_y - floor_y, int64(floor_x), int64(floor_y)
            to = uint64(3 * x)
            if (ix >= 0) & (iy >= 0) & (ix < rotated_width - 1) & (iy < rotated_height - 1):
                at = uint64(3 * (iy * rotated_width + ix))
                for c in range(uint64(3)):
                    i, j = at + c, at + down + c
                    row_x[to + c] = _blend(flat_x[i], flat_x[i + right], flat_x[j], flat_x[j + right], u, v)
                for c in range(uint64(3)):
                    i, j = at + c, at + down + c
                    row_y[to + c] = _blend(flat_y[i], flat_y[i + right], flat_y[j], flat_y[j + right], u, v)
            else:
                for c in range(uint64(3)):
                    row_x[to + c] = _blend_at_border(dx, ix, iy, c, u, v)
                    row_y[to + c] = _blend_at_border(dy, ix, iy, c, u, v)


@nb.njit(cache=True, nogil=True, fastmath={"contract"}, inline="always")
def _blend(upper_left, upper_right, lower_left, lower_right, u, v):  # type: ignore[no-untyped-def]
    a, b, c, d = float32(upper_left), float32(upper_right), float32(lower_left), float32(lower_right)
    upper, lower = a + u * (b - a), c + u * (d - c)
    return upper + v * (lower - upper)


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _blend_at_border(plane, x, y, c, u, v):  # type: ignore[no-untyped-def]
    return _blend(_at(plane, y, x, c), _at(plane, y, x + 1, c), _at(plane, y + 1, x, c), _at(plane, y + 1, x + 1, c), u, v)


@nb.njit(cache=True, nogil=True, inline="always")
def _at(plane, y, x, c):  # type: ignore[no-untyped-def]
    inside = (y >= 0) & (x >= 0) & (y < plane.shape[0]) & (x < plane.shape[1])
    return float32(plane[y, x, c]) if inside else float32(0)
