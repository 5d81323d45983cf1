"""PIL's Gaussian blur, bit for bit: three box blurs with fractional edges along each axis, each rounded to bytes (Gwosdek et al., 2011)."""

import numba as nb
import numpy as np

_PASSES = 3


@nb.njit(cache=True, nogil=True)
def blur_columns(plane, size, sigma, sums, out):  # type: ignore[no-untyped-def]
    """Blur along the columns of plane [R, C] uint8, over its first `size` rows, into out [R, C]. The cost does not grow with sigma.

    `plane` is overwritten; `sums` [C] uint32 is room to work in.
    """
    radius = _box_radius(np.float32(sigma))
    whole = int(radius)
    inside = np.uint32(np.float32(1 << 24) / (radius * np.float32(2) + np.float32(1)))
    edge = np.uint32((np.int64(1 << 24) - (2 * whole + 1) * np.int64(inside)) // 2)
    source, target = plane, out
    for _ in range(_PASSES):
        if whole == 0:
            _box_3(source, target, size, inside, edge)
        else:
            _box(source, target, size, whole, inside, edge, sums)
        source, target = target, source


@nb.njit(cache=True, nogil=True)
def _box_radius(sigma):  # type: ignore[no-untyped-def]
    """The box, with a fractional part, of which three passes have the variance of a Gaussian; float32 at each step, as in PIL."""
    one, three, six = np.float32(1), np.float32(3), np.float32(6)
    variance = sigma * sigma / np.float32(_PASSES)
    length = np.float32(np.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(np.floor((np.float64(length) - 1.0) / 2.0))
    share = (whole + whole + one) * (whole * (whole + one) - three * variance)
    return whole + share / (six * (variance - (whole + one) * (whole + one)))


@nb.njit(cache=True, nogil=True)
def _box(source, target, size, whole, inside, edge, sums):  # type: ignore[no-untyped-def]
    """target[y] = (inside * the sum of source[y - whole … y + whole] + edge * the rows next to these) / 2**24, rounded; borders repeat."""
    last, n, half = size - 1, source.shape[1], np.uint32(1 << 23)
    sums[:] = 0
    for k in range(-whole, whole + 1):
        row = source[min(max(k, 0), last)]
        for i in range(n):
            sums[i] = np.uint32(sums[i] + row[i])
    for y in range(size):
        above, leaving, below, to = source[max(y - whole - 1, 0)], source[max(y - whole, 0)], source[min(y + whole + 1, last)], target[y]
        for i in range(n):
            to[i] = np.uint8(np.uint32(sums[i] * inside + (np.uint32(above[i]) + np.uint32(below[i])) * edge + half) >> np.uint32(24))
            sums[i] = np.uint32(sums[i] + below[i] - leaving[i])


@nb.njit(cache=True, nogil=True)
def _box_3(source, target, size, inside, edge):  # type: ignore[no-untyped-def]
    """The same where `whole` is 0, as for every sigma below 1.4: a sum of one row needs no memory."""
    last, n, half = size - 1, source.shape[1], np.uint32(1 << 23)
    for y in range(size):
        above, middle, below, to = source[max(y - 1, 0)], source[y], source[min(y + 1, last)], target[y]
        for i in range(n):
            to[i] = np.uint8(np.uint32(middle[i] * inside + (np.uint32(above[i]) + np.uint32(below[i])) * edge + half) >> np.uint32(24))
