"""Rendering kernels: from decoded pixels to finished views, one call for many crops, without the GIL.

How one crop goes: two identical passes that blend rows, with a transposition after each, are an antialiased bilinear resize; both blend
contiguous bytes in 16-bit lanes, which is what makes them fast. Colors then change plane by plane in bytes, with PIL's own rounding.
Loops index slices, not `a[offset + i]`: only so do they vectorize.
"""

from typing import Any

import numba as nb
import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

_ONE = 256  # weights of a blend are integers that sum to this: 255 * 256 fits 16 bits


def _typed_pointer(_typing: Any, address: Any) -> Any:
    """An integer address as a pointer that `carray` takes: decoded images come as addresses, whatever their number."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_typed_pointer)


@nb.njit(cache=True, nogil=True)
def render_crops(  # type: ignore[no-untyped-def]
    samples, num_samples, addresses, regions, places, boxes, beyond_box, flips, orders, factors, hues, grays, sigmas, solarized, sizes, out
):
    """Render all views of samples[0] … samples[1] - 1.

    Args:
        num_samples: B; view v of sample b is crop v * B + b.
        addresses: [U] int64 of decoded RGB pixels; 0: could not be decoded, its crops are left as they are.
        regions: [U, 4] int64 xyxy, the part of its image that each decoded image holds.
        places: [M] int64 into the two.
        boxes … solarized: as in `Crops`.
        sizes: [V] int64, side of each slot's views.
        out: flat uint8; slot by slot [B, S, S, 3].
    """
    start = 0
    for v in range(len(sizes)):
        size = sizes[v]
        rounded = (size + 7) // 8 * 8
        planes = np.empty((3, size * size), np.uint8)
        for b in range(samples[0], samples[1]):
            m = v * num_samples + b
            region = regions[places[m]]
            if addresses[places[m]] == 0:
                continue
            height, width = region[3] - region[1], region[2] - region[0]
            pixels = carray(_pointer(addresses[places[m]]), (height * width * 3,), np.uint8)
            x1, y1 = boxes[m, 0] - region[0], boxes[m, 1] - region[1]
            x2, y2 = boxes[m, 2] - region[0], boxes[m, 3] - region[1]
            _resize(pixels, height, width, x1, y1, x2, y2, beyond_box, size, rounded, flips[m], planes)
            for op in orders[m]:
                if op == 3:
                    if hues[m] != 0:
                        _shift_hue(planes[0], planes[1], planes[2], np.int64(hues[m] * 255))
                elif factors[m, op] != 1:
                    _adjust(planes[0], planes[1], planes[2], op, factors[m, op])
            num_planes = 3
            if grays[m]:
                _to_gray(planes[0], planes[1], planes[2], planes[0])
                num_planes = 1
            if sigmas[m] > 0:
                for c in range(num_planes):
                    _blur(planes[c], size, sigmas[m])
            view = out[start + b * size * size * 3 : start + (b + 1) * size * size * 3]
            last = num_planes - 1
            _interleave(planes[0], planes[min(1, last)], planes[min(2, last)], solarized[m], view)
        start += num_samples * size * size * 3


@nb.njit(cache=True, nogil=True)
def _triangle(start, end, low, high, size):  # type: ignore[no-untyped-def]
    """PIL's bilinear filter for `size` outputs over [start, end), reading only within [low, high): first input, count, weights of each."""
    scale = (end - start) / size
    support = max(scale, 1.0)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(support)) * 2 + 2), np.uint16)
    for i in range(size):
        center = start + (i + 0.5) * scale
        first[i] = min(max(int(center - support + 0.5), low), high - 1)
        count[i] = max(min(int(center + support + 0.5), high) - first[i], 1)
        total = 0.0
        for k in range(count[i]):
            total += max(0.0, 1.0 - abs(first[i] + k - center + 0.5) / support)
        # Rounding the running sum keeps the integer sum exact.
        running, given = 0.0, 0
        for k in range(count[i]):
            running += max(0.0, 1.0 - abs(first[i] + k - center + 0.5) / support) if total > 0 else 1.0
            upto = int(running / (total if total > 0 else count[i]) * _ONE + 0.5)
            weights[i, k] = upto - given
            given = upto
    return first, count, weights


@nb.njit(cache=True, nogil=True)
def _blend_rows(source, stride, offset, first, count, weights, total, row):  # type: ignore[no-untyped-def]
    """row[i] = the weighted mean of source[(first + k) * stride + offset + i] over k, rounded."""
    n = len(row)
    if count == 1:
        row[:] = source[first * stride + offset : first * stride + offset + n]
        return
    k = 0
    while k < count:
        at = (first + k) * stride + offset
        a, w_a = source[at : at + n], weights[k]
        if k + 4 <= count:
            b, w_b = source[at + stride : at + stride + n], weights[k + 1]
            c, w_c = source[at + 2 * stride : at + 2 * stride + n], weights[k + 2]
            d, w_d = source[at + 3 * stride : at + 3 * stride + n], weights[k + 3]
            if k == 0:
                for i in range(n):
                    total[i] = np.uint16(128 + a[i] * w_a + b[i] * w_b + c[i] * w_c + d[i] * w_d)
            else:
                for i in range(n):
                    total[i] = np.uint16(total[i] + a[i] * w_a + b[i] * w_b + c[i] * w_c + d[i] * w_d)
            k += 4
        elif k + 2 <= count:
            b, w_b = source[at + stride : at + stride + n], weights[k + 1]
            if k == 0:
                for i in range(n):
                    total[i] = np.uint16(128 + a[i] * w_a + b[i] * w_b)
            else:
                for i in range(n):
                    total[i] = np.uint16(total[i] + a[i] * w_a + b[i] * w_b)
            k += 2
        else:
            for i in range(n):
                total[i] = np.uint16(total[i] + a[i] * w_a)
            k += 1
    for i in range(n):
        row[i] = np.uint8(total[i] >> 8)


@nb.njit(cache=True, nogil=True)
def _transpose(source, columns, target):  # type: ignore[no-untyped-def]
    """target [columns, R] = source [R, columns] transposed; R is a multiple of 8. Eight rows at a time become vectorized stores."""
    rows = len(source)
    tile = np.empty(columns * 8, np.uint8)
    words = tile.view(np.uint64)
    target_words = target.view(np.uint64)  # [columns, R / 8]
    for y in range(0, rows, 8):
        a, b, c, d = source[y], source[y + 1], source[y + 2], source[y + 3]
        e, f, g, h = source[y + 4], source[y + 5], source[y + 6], source[y + 7]
        for i in range(columns):
            tile[8 * i], tile[8 * i + 1], tile[8 * i + 2], tile[8 * i + 3] = a[i], b[i], c[i], d[i]
            tile[8 * i + 4], tile[8 * i + 5], tile[8 * i + 6], tile[8 * i + 7] = e[i], f[i], g[i], h[i]
        for i in range(columns):
            target_words[i, y // 8] = words[i]


@nb.njit(cache=True, nogil=True)
def _resize(pixels, height, width, x1, y1, x2, y2, beyond_box, size, rounded, flip, planes):  # type: ignore[no-untyped-def]
    """Crop, resize and flip into planes [3, size * size]."""
    if beyond_box:
        left, top, right, bottom = 0, 0, width, height
    else:
        left, top = min(max(int(x1), 0), width - 1), min(max(int(y1), 0), height - 1)
        right, bottom = min(max(int(x2), left + 1), width), min(max(int(y2), top + 1), height)
    first_x, count_x, weights_x = _triangle(x1, x2, left, right, size)
    first_y, count_y, weights_y = _triangle(y1, y2, top, bottom, size)
    left, right = first_x[0], first_x[size - 1] + count_x[size - 1]
    n = (right - left) * 3
    total = np.empty(max(n, 3 * rounded), np.uint16)
    narrow = np.zeros((rounded, n), np.uint8)  # right height, source width
    for y in range(size):
        _blend_rows(pixels, width * 3, left * 3, first_y[y], count_y[y], weights_y[y], total, narrow[y])
    turned = np.empty((n, rounded), np.uint8)  # row 3 * x + channel: a column of that channel
    _transpose(narrow, n, turned)
    columns = np.zeros((rounded, 3 * rounded), np.uint8)  # row x: three columns of the view
    flat = turned.reshape(-1)
    for x in range(size):
        row = columns[size - 1 - x if flip else x]
        _blend_rows(flat, 3 * rounded, 0, first_x[x] - left, count_x[x], weights_x[x], total, row)
    upright = np.empty((3 * rounded, rounded), np.uint8)  # row channel * rounded + y
    _transpose(columns, 3 * rounded, upright)
    for c in range(3):
        for y in range(size):
            planes[c, y * size : (y + 1) * size] = upright[c * rounded + y, :size]


@nb.njit(cache=True, nogil=True, inline="always")
def _luma(r, g, b):  # type: ignore[no-untyped-def]
    """PIL's L, as float32; all steps are exact in 24 bits."""
    weighted = np.float32(19595) * np.float32(r) + np.float32(38470) * np.float32(g) + np.float32(7471) * np.float32(b)
    return np.floor((weighted + np.float32(32768)) * np.float32(1 / 65536))


@nb.njit(cache=True, nogil=True, inline="always")
def _mix(start, value, factor):  # type: ignore[no-untyped-def]
    """PIL's blend of two images: truncated, not rounded."""
    mixed = start + factor * (np.float32(value) - start)
    return np.uint8(np.int32(min(max(mixed, np.float32(0)), np.float32(255))))


@nb.njit(cache=True, nogil=True)
def _adjust(r, g, b, op, factor):  # type: ignore[no-untyped-def]
    """Brightness (0): mix with black; contrast (1): with the mean gray; saturation (2): with the gray image."""
    if op == 2:
        for i in range(len(r)):
            gray = _luma(r[i], g[i], b[i])
            r[i], g[i], b[i] = _mix(gray, r[i], factor), _mix(gray, g[i], factor), _mix(gray, b[i], factor)
        return
    start = np.float32(0)
    if op == 1:
        total = np.int64(0)
        for i in range(len(r)):
            total += np.int64(_luma(r[i], g[i], b[i]))
        start = np.float32(np.int64(total / len(r) + 0.5))
    for i in range(len(r)):
        r[i], g[i], b[i] = _mix(start, r[i], factor), _mix(start, g[i], factor), _mix(start, b[i], factor)


@nb.njit(cache=True, nogil=True, inline="always")
def _from_hue(hue, offset, value, saturation):  # type: ignore[no-untyped-def]
    """One channel of an HSV color; hue in sixths of a turn."""
    k = hue + offset
    k = k - np.float32(6) * np.floor(k * np.float32(1 / 6))
    share = min(max(min(k, np.float32(4) - k), np.float32(0)), np.float32(1))
    return np.uint8(np.int32(value * (np.float32(1) - saturation * share) + np.float32(0.5)))


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _shift_hue(red, green, blue, shift):  # type: ignore[no-untyped-def]
    """Turn the hue by shift / 255 by way of PIL's 8-bit HSV, without a branch."""
    one, zero = np.float32(1), np.float32(0)
    for i in range(len(red)):
        r, g, b = np.float32(red[i]), np.float32(green[i]), np.float32(blue[i])
        value, low = max(r, max(g, b)), min(r, min(g, b))
        span = value - low
        inverse = one / max(span, one)
        saturation = np.floor(span / max(value, one) * np.float32(255)) * np.float32(1 / 255)
        from_red, from_green = (g - b) * inverse, np.float32(2) + (b - r) * inverse
        hue = from_red if r == value else (from_green if g == value else np.float32(4) + (r - g) * inverse)
        hue = hue * np.float32(1 / 6)
        hue = hue + (one if hue < zero else zero)
        byte = (np.int32(hue * np.float32(255)) + np.int32(shift)) & np.int32(255)
        turned = np.float32(byte) * np.float32(6 / 255)
        red[i] = _from_hue(turned, np.float32(5), value, saturation)
        green[i] = _from_hue(turned, np.float32(3), value, saturation)
        blue[i] = _from_hue(turned, np.float32(1), value, saturation)


@nb.njit(cache=True, nogil=True)
def _to_gray(r, g, b, out):  # type: ignore[no-untyped-def]
    for i in range(len(r)):
        out[i] = np.uint8(np.int32(_luma(r[i], g[i], b[i])))


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _blur(plane, size, sigma):  # type: ignore[no-untyped-def]
    """A Gaussian in place, borders reflected. What a neighbor adds below a thousandth of the center's weight is left out."""
    radius = min(int(3.72 * sigma), size - 1)
    if radius == 0:
        return
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    source = plane.copy()
    padded, total = np.empty(size + 2 * radius, np.float32), np.empty(size, np.float32)
    for y in range(size):
        middle, center = padded[radius : radius + size], source[y * size : (y + 1) * size]
        w = weights[0]
        for x in range(size):
            middle[x] = w * center[x]
        for k in range(1, radius + 1):
            above, below = abs(y - k), size - 1 - abs(size - 1 - y - k)
            a, b, w = source[above * size : (above + 1) * size], source[below * size : (below + 1) * size], weights[k]
            for x in range(size):
                middle[x] += w * np.float32(np.int32(a[x]) + np.int32(b[x]))
        for k in range(1, radius + 1):
            padded[radius - k], padded[radius + size - 1 + k] = middle[k], middle[size - 1 - k]
        w = weights[0]
        for x in range(size):
            total[x] = w * middle[x]
        for k in range(1, radius + 1):
            a, b, w = padded[radius - k : radius - k + size], padded[radius + k : radius + k + size], weights[k]
            for x in range(size):
                total[x] += w * (a[x] + b[x])
        row = plane[y * size : (y + 1) * size]
        for x in range(size):
            row[x] = np.uint8(np.int32(total[x] + np.float32(0.5)))


@nb.njit(cache=True, nogil=True)
def _interleave(r, g, b, solarized, out):  # type: ignore[no-untyped-def]
    """Planes to pixels; solarized: values from 128 on are inverted."""
    flip = np.uint8(255 if solarized else 0)
    for i in range(len(r)):
        out[3 * i] = r[i] ^ (flip if r[i] >= 128 else np.uint8(0))
        out[3 * i + 1] = g[i] ^ (flip if g[i] >= 128 else np.uint8(0))
        out[3 * i + 2] = b[i] ^ (flip if b[i] >= 128 else np.uint8(0))
