"""Colors with PIL's own rounding, computed in float32 on tiles that stay in the nearest cache.

Loops index slices, not `a[offset + i]`: only so do they vectorize.
"""

import numba as nb
import numpy as np

CONTRAST, SATURATION, HUE = 1, 2, 3  # and brightness, 0: the numbers of `Crops.order`
TILE_PX = 512
_FINITE = {"nnan", "ninf", "nsz"}  # no reordering: the rounding stays PIL's


@nb.njit(cache=True, nogil=True)
def recolor(red, green, blue, ops, factors, hue, gray, tile):  # type: ignore[no-untyped-def]
    """Apply `ops` one after the other to planes [n] uint8, in place.

    Args:
        ops: numbers as in `Crops.order`; those that change nothing are skipped.
        factors: [3] float32; hue: in 255ths of a circle, an integer. gray: what contrast mixes with.
        tile: [3, TILE_PX] float32, room to work in.
    """
    active = False
    for op in ops:
        active |= hue != 0 if op == HUE else factors[op] != 1
    if not active:
        return
    for at in range(0, len(red), TILE_PX):
        n = min(TILE_PX, len(red) - at)
        r, g, b = tile[0][:n], tile[1][:n], tile[2][:n]
        bytes_r, bytes_g, bytes_b = red[at : at + n], green[at : at + n], blue[at : at + n]
        for i in range(n):
            r[i], g[i], b[i] = bytes_r[i], bytes_g[i], bytes_b[i]
        for op in ops:
            if op == HUE:
                if hue != 0:
                    _shift_hue(r, g, b, hue)
            elif factors[op] != 1:
                if op == SATURATION:
                    _saturate(r, g, b, factors[op])
                else:
                    start = np.float32(gray if op == CONTRAST else 0)
                    _mix_all(r, start, factors[op])
                    _mix_all(g, start, factors[op])
                    _mix_all(b, start, factors[op])
        for i in range(n):
            bytes_r[i], bytes_g[i], bytes_b[i] = np.uint8(np.int32(r[i])), np.uint8(np.int32(g[i])), np.uint8(np.int32(b[i]))


@nb.njit(cache=True, nogil=True)
def mean_gray(planes, size):  # type: ignore[no-untyped-def]
    """Of the first `size` rows and columns of planes [3, R, C], rounded. Grays are not rounded one by one, to no effect but rarely."""
    total = 0
    for y in range(size):
        total += 19595 * _sum(planes[0, y], size) + 38470 * _sum(planes[1, y], size) + 7471 * _sum(planes[2, y], size)
    return int(total / (65536 * size * size) + 0.5)


@nb.njit(cache=True, nogil=True)
def to_gray(red, green, blue):  # type: ignore[no-untyped-def]
    """The first plane becomes PIL's L of all three."""
    for i in range(len(red)):
        red[i] = np.uint8(np.int32(_luma(np.float32(red[i]), np.float32(green[i]), np.float32(blue[i]))))


@nb.njit(cache=True, nogil=True)
def _sum(row, n):  # type: ignore[no-untyped-def]
    total = np.uint32(0)
    for i in range(n):
        total = np.uint32(total + row[i])
    return np.int64(total)


@nb.njit(cache=True, nogil=True, inline="always")
def _luma(r, g, b):  # type: ignore[no-untyped-def]
    """PIL's L; all steps are exact in the 24 bits of float32."""
    weighted = np.float32(19595) * r + np.float32(38470) * g + np.float32(7471) * b
    return np.floor((weighted + np.float32(32768)) * np.float32(1 / 65536))


@nb.njit(cache=True, nogil=True, inline="always")
def _mix(start, value, factor):  # type: ignore[no-untyped-def]
    """PIL's blend of two images: truncated, not rounded."""
    return np.floor(min(max(start + factor * (value - start), np.float32(0)), np.float32(255)))


@nb.njit(cache=True, nogil=True, fastmath=_FINITE)
def _mix_all(values, start, factor):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        values[i] = _mix(start, values[i], factor)


@nb.njit(cache=True, nogil=True, fastmath=_FINITE)
def _saturate(r, g, b, factor):  # type: ignore[no-untyped-def]
    """Mix with the gray image."""
    for i in range(len(r)):
        gray = _luma(r[i], g[i], b[i])
        r[i], g[i], b[i] = _mix(gray, r[i], factor), _mix(gray, g[i], factor), _mix(gray, b[i], factor)


@nb.njit(cache=True, nogil=True, inline="always")
def _lowered(value, span, share):  # type: ignore[no-untyped-def]
    """A channel of an HSV color: `value` less a share of the span, rounded; the share is limited to [0, 1]."""
    return np.floor(value - span * min(max(share, np.float32(0)), np.float32(1)) + np.float32(0.5))


@nb.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FINITE)
def _shift_hue(red, green, blue, shift):  # type: ignore[no-untyped-def]
    """Rotate the hue by shift / 255 as PIL's 8-bit HSV does, without a branch."""
    one, zero = np.float32(1), np.float32(0)
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value, low = max(r, max(g, b)), min(r, min(g, b))
        span = value - low
        inverse = np.float32(1 / 6) / max(span, one)
        saturation = np.floor(span / max(value, one) * np.float32(255)) * np.float32(1 / 255)
        from_red, from_green = (g - b) * inverse, np.float32(1 / 3) + (b - r) * inverse
        hue = from_red if r == value else (from_green if g == value else np.float32(2 / 3) + (r - g) * inverse)
        hue = hue + (one if hue < zero else zero)
        byte = (np.int32(hue * np.float32(255)) + np.int32(shift)) & np.int32(255)
        sixths, span = np.float32(byte) * np.float32(6 / 255), value * saturation
        red[i] = _lowered(value, span, np.float32(2) - abs(sixths - np.float32(3)))
        green[i] = _lowered(value, span, abs(sixths - np.float32(2)) - one)
        blue[i] = _lowered(value, span, abs(sixths - np.float32(4)) - one)
