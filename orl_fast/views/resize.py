"""Crop, resize and flip: PIL's antialiased bilinear filter on bytes, with weights of 1/256.

Two passes that blend whole rows, with a transposition after the first; both work on contiguous bytes in 16-bit lanes. Positions are those
of the image, whatever part of it was decoded, so that the result does not depend on that part.
"""

import numba as nb
import numpy as np

from orl_fast.views.vector import TILE_COLUMNS, TILE_ROWS, blend_32, blend_64, transpose_tile

_ONE = 256  # weights of a blend are integers that sum to this: 255 * 256 fits 16 bits


@nb.njit(cache=True, nogil=True)
def padded(size):  # type: ignore[no-untyped-def]
    """The side of a plane in memory: whole tiles."""
    return (size + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS


@nb.njit(cache=True, nogil=True)
def _triangle(start, end, low, high, size):  # type: ignore[no-untyped-def]
    """PIL's bilinear filter for `size` outputs over [start, end), reading only within [low, high): first input, count, weights of each."""
    scale = (end - start) / size
    support = max(scale, 1.0)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    longest = int(np.ceil(support)) * 2 + 2
    weights, shares = np.empty((size, longest), np.uint16), np.empty(longest)
    for i in range(size):
        center = start + (i + 0.5) * scale
        first[i] = min(max(int(center - support + 0.5), low), high - 1)
        count[i] = max(min(int(center + support + 0.5), high) - first[i], 1)
        total = 0.0
        for k in range(count[i]):
            shares[k] = max(0.0, support - abs(first[i] + k - center + 0.5))
            total += shares[k]
        if total == 0:  # a box beyond its image: its nearest pixels
            shares[:] = 1.0
            total = float(count[i])
        # Rounding the running sum keeps the sum of the integers exact.
        running, given, factor = 0.5, 0, _ONE / total
        for k in range(count[i]):
            running += shares[k] * factor
            weights[i, k] = int(running) - given
            given = int(running)
        weights[i, count[i] - 1] += _ONE - given
    return first, count, weights


@nb.njit(cache=True, nogil=True)
def _blend_row(source, stride, count, weights, n, target):  # type: ignore[no-untyped-def]
    """n bytes at `target`: the weighted mean of `count` rows at `source`. At least 32 bytes are written, and read if n >= 32."""
    x = 0
    while x + 64 <= n:
        blend_64(source + x, stride, count, weights, target + x)
        x += 64
    if x + 32 <= n:
        blend_32(source + x, stride, count, weights, target + x)
        x += 32
    if x < n:
        blend_32(source + n - 32, stride, count, weights, target + n - 32)


@nb.njit(cache=True, nogil=True)
def _widened(pixels, row_bytes):  # type: ignore[no-untyped-def]
    """Rows that are shorter than a block, with room after each."""
    wide = np.zeros((len(pixels) // row_bytes, TILE_COLUMNS), np.uint8)
    wide[:, :row_bytes] = pixels.reshape(-1, row_bytes)
    return wide.reshape(-1)


@nb.njit(cache=True, nogil=True)
def resize(pixels, region, box, beyond_box, size, flip, strip, turned, planes):  # type: ignore[no-untyped-def]
    """Cut out a box and resize it.

    Args:
        pixels: flat uint8, RGB of the `region` xyxy of the image. box: xyxy, floats, in the same coordinates.
        strip: [16 * n] uint8 and turned: [n * padded(size)] uint8, room to work in; n = padded(3 * width of the region).
        planes: [3, padded(size), padded(size)] uint8: where the view goes, transposed: channel, x, y.
    """
    left, top, right, bottom = region[0], region[1], region[2], region[3]
    row_bytes = (right - left) * 3
    x1, y1, x2, y2 = box
    if not beyond_box:  # only pixels that the box covers at least in part are read
        left, top = min(max(int(np.floor(x1)), left), right - 1), min(max(int(np.floor(y1)), top), bottom - 1)
        right, bottom = min(max(int(np.ceil(x2)), left + 1), right), min(max(int(np.ceil(y2)), top + 1), bottom)
    first_x, count_x, weights_x = _triangle(x1, x2, left, right, size)
    first_y, count_y, weights_y = _triangle(y1, y2, top, bottom, size)
    left, right = first_x[0], first_x[size - 1] + count_x[size - 1]
    n, side = (right - left) * 3, padded(size)
    if row_bytes < TILE_COLUMNS:
        pixels, row_bytes = _widened(pixels, row_bytes), TILE_COLUMNS
    # Of a narrow crop more columns are read than it has: those to its right, or to its left where the image ends.
    columns, stride = max(n, TILE_COLUMNS), padded(n)
    shift = max(0, (left - region[0]) * 3 + columns - row_bytes)
    source, strip_at, turned_at = pixels.ctypes.data + (left - region[0]) * 3 - shift, strip.ctypes.data, turned.ctypes.data
    for y in range(0, size, TILE_ROWS):
        for i in range(min(TILE_ROWS, size - y)):
            weights, row = weights_y[y + i], source + (first_y[y + i] - region[1]) * row_bytes
            _blend_row(row, row_bytes, count_y[y + i], weights.ctypes.data, columns, strip_at + i * stride)
        for x in range(0, columns, TILE_COLUMNS):
            transpose_tile(strip_at + x, stride, turned_at + x * side + y, side)
    for x in range(size):
        row = turned_at + (3 * (first_x[x] - left) + shift) * side
        weights = weights_x[x]
        for c in range(3):
            plane = planes[c, size - 1 - x if flip else x]
            _blend_row(row + c * side, 3 * side, count_x[x], weights.ctypes.data, side, plane.ctypes.data)


@nb.njit(cache=True, nogil=True)
def transpose(source, target):  # type: ignore[no-untyped-def]
    """target [C, R] = source [R, C] transposed; both sides are whole tiles."""
    rows, columns = source.shape
    from_address, to_address = source.ctypes.data, target.ctypes.data
    for x in range(0, columns, TILE_COLUMNS):
        for y in range(0, rows, TILE_ROWS):
            transpose_tile(from_address + y * columns + x, columns, to_address + x * rows + y, rows)
