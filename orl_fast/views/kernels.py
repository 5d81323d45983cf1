"""Rendering kernels: from decoded pixels to finished views, one call for many crops, without the GIL.

One crop: two identical passes that blend rows, with a transposition after each, are an antialiased bilinear resize; both blend
contiguous bytes in 16-bit lanes, which is what makes them fast. Colors then change plane by plane in bytes, with PIL's own rounding.
Loops index slices, not `a[offset + i]`: only so do they vectorize.
"""

from typing import Any

import numba as nb
import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

_FINITE = {"nnan", "ninf", "nsz"}  # no reordering: the rounding stays PIL's
_TILE, _BLOCK = 128, 4096
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
        sizes: [V] int64, side of each view.
        out: flat uint8; view by view [B, S, S, 3].
    """
    start = 0
    for v in range(len(sizes)):
        size = sizes[v]
        for b in range(samples[0], samples[1]):
            m = v * num_samples + b
            region = regions[places[m]]
            if addresses[places[m]] == 0:
                continue
            height, width = region[3] - region[1], region[2] - region[0]
            pixels = carray(_pointer(addresses[places[m]]), (height * width * 3,), np.uint8)
            x1, y1 = boxes[m, 0] - region[0], boxes[m, 1] - region[1]
            x2, y2 = boxes[m, 2] - region[0], boxes[m, 3] - region[1]
            planes = _resize(pixels, height, width, x1, y1, x2, y2, beyond_box, size, flips[m])
            for op in orders[m]:
                if op == 3:
                    if hues[m] != 0:
                        _shift_hue(planes[0], planes[1], planes[2], np.int64(hues[m] * 255))
                elif factors[m, op] != 1:
                    _adjust(planes[0], planes[1], planes[2], op, factors[m, op])
            if grays[m]:
                planes = _gray(planes[0], planes[1], planes[2]).reshape(1, size * size)
            if sigmas[m] > 0:
                for plane in planes:
                    _blur(plane, size, sigmas[m])
            view = out[start + b * size * size * 3 : start + (b + 1) * size * size * 3]
            _interleave(planes[0], planes[len(planes) // 2], planes[-1], solarized[m], view)
        start += num_samples * size * size * 3


@nb.njit(cache=True, nogil=True)
def _copy(source, target):  # type: ignore[no-untyped-def]
    """A slice assignment, six times faster: numba's own looks for overlaps first."""
    for i in range(len(target)):
        target[i] = source[i]


@nb.njit(cache=True, nogil=True)
def _triangle(start, end, low, high, size):  # type: ignore[no-untyped-def]
    """PIL's bilinear filter for `size` outputs over [start, end), reading only within [low, high): first input, count, weights of each."""
    scale = (end - start) / size
    support = max(scale, 1.0)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    longest = int(np.ceil(support)) * 2 + 5  # and up to three zeros, see `_blend_rows`
    weights, shares = np.zeros((size, longest), np.uint16), np.empty(longest)
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
        running, given = 0.5, 0
        for k in range(count[i]):
            running += shares[k] * (_ONE / total)
            weights[i, k] = int(running) - given
            given = int(running)
        weights[i, count[i] - 1] += _ONE - given
    return first, count, weights


@nb.njit(cache=True, nogil=True)
def _blend_rows(source, stride, offset, first, count, weights, total, row):  # type: ignore[no-untyped-def]
    """row[i] = the weighted mean of source[(first + k) * stride + offset + i] over k, rounded."""
    n = len(row)
    if count == 1:
        _copy(source[first * stride + offset : first * stride + offset + n], row)
        return
    # Four rows at a time; missing rows are read from the last one with weight 0. The last four are written to `row` directly.
    last = (first + count - 1) * stride + offset
    for k in range(0, count, 4):
        at = (first + k) * stride + offset
        a, w_a = source[at : at + n], weights[k]
        at = min(at + stride, last)
        b, w_b = source[at : at + n], weights[k + 1]
        if count == 2:
            for i in range(n):
                row[i] = np.uint8(np.uint16(128 + a[i] * w_a + b[i] * w_b) >> 8)
            return
        at = min(at + stride, last)
        c, w_c = source[at : at + n], weights[k + 2]
        at = min(at + stride, last)
        d, w_d = source[at : at + n], weights[k + 3]
        if count <= 4:
            for i in range(n):
                row[i] = np.uint8(np.uint16(128 + a[i] * w_a + b[i] * w_b + c[i] * w_c + d[i] * w_d) >> 8)
        elif k == 0:
            for i in range(n):
                total[i] = np.uint16(128 + a[i] * w_a + b[i] * w_b + c[i] * w_c + d[i] * w_d)
        elif k + 4 < count:
            for i in range(n):
                total[i] = np.uint16(total[i] + a[i] * w_a + b[i] * w_b + c[i] * w_c + d[i] * w_d)
        else:
            for i in range(n):
                row[i] = np.uint8(np.uint16(total[i] + a[i] * w_a + b[i] * w_b + c[i] * w_c + d[i] * w_d) >> 8)


@nb.njit(cache=True, nogil=True)
def _transpose(source, target):  # type: ignore[no-untyped-def]
    """target [C, R] = source [R, C] transposed; R is a multiple of 8. Eight rows at a time become vectorized stores."""
    rows, columns = source.shape
    tile = np.empty(_TILE * 8, np.uint8)
    words, target_words = tile.view(np.uint64), target.view(np.uint64)  # [columns, R / 8]
    for x in range(0, columns, _TILE):  # a part of the target that stays in the nearest cache
        width = min(_TILE, columns - x)
        for y in range(0, rows, 8):
            part = source[y : y + 8, x : x + width]
            a, b, c, d, e, f, g, h = part[0], part[1], part[2], part[3], part[4], part[5], part[6], part[7]
            for i in range(width):
                tile[8 * i], tile[8 * i + 1], tile[8 * i + 2], tile[8 * i + 3] = a[i], b[i], c[i], d[i]
                tile[8 * i + 4], tile[8 * i + 5], tile[8 * i + 6], tile[8 * i + 7] = e[i], f[i], g[i], h[i]
            for i in range(width):
                target_words[x + i, y // 8] = words[i]


@nb.njit(cache=True, nogil=True)
def _resize(pixels, height, width, x1, y1, x2, y2, beyond_box, size, flip):  # type: ignore[no-untyped-def]
    """Crop, resize and flip; returns planes [3, size * size]."""
    if beyond_box:
        left, top, right, bottom = 0, 0, width, height
    else:
        x1, y1, x2, y2 = np.rint(x1), np.rint(y1), np.rint(x2), np.rint(y2)
        left, top = min(max(int(x1), 0), width - 1), min(max(int(y1), 0), height - 1)
        right, bottom = min(max(int(x2), left + 1), width), min(max(int(y2), top + 1), height)
    first_x, count_x, weights_x = _triangle(x1, x2, left, right, size)
    first_y, count_y, weights_y = _triangle(y1, y2, top, bottom, size)
    left, right = first_x[0], first_x[size - 1] + count_x[size - 1]
    n, rounded = (right - left) * 3, (size + 7) // 8 * 8
    total = np.empty(max(n, 3 * rounded), np.uint16)
    narrow = np.empty((rounded, n), np.uint8)  # right height, source width
    for y in range(size):
        _blend_rows(pixels, width * 3, left * 3, first_y[y], count_y[y], weights_y[y], total, narrow[y])
    transposed = np.empty((n, rounded), np.uint8)  # row 3 * x + channel: a column of that channel
    _transpose(narrow, transposed)
    columns = np.empty((rounded, 3 * rounded), np.uint8)  # row x: three columns of the view
    flat = transposed.reshape(-1)
    for x in range(size):
        row = columns[size - 1 - x if flip else x]
        _blend_rows(flat, 3 * rounded, 0, first_x[x] - left, count_x[x], weights_x[x], total, row)
    upright = np.empty((3 * rounded, rounded), np.uint8)  # row channel * rounded + y
    _transpose(columns, upright)
    if rounded == size:
        return upright.reshape(3, size * size)
    planes = np.empty((3, size * size), np.uint8)
    for c in range(3):
        for y in range(size):
            _copy(upright[c * rounded + y, :size], planes[c, y * size : (y + 1) * size])
    return planes


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


@nb.njit(cache=True, nogil=True, fastmath=_FINITE)
def _adjust(r, g, b, op, factor):  # type: ignore[no-untyped-def]
    """Brightness (0): mix with black; contrast (1): with the mean gray; saturation (2): with the gray image."""
    if op == 2:
        for i in range(len(r)):
            gray = _luma(r[i], g[i], b[i])
            r[i], g[i], b[i] = _mix(gray, r[i], factor), _mix(gray, g[i], factor), _mix(gray, b[i], factor)
        return
    start = np.float32(0)
    if op == 1:
        # The mean of grays that are not rounded one by one: the same to a few thousandths.
        mean = (19595 * _sum(r) + 38470 * _sum(g) + 7471 * _sum(b)) / (65536 * len(r))
        start = np.float32(int(mean + 0.5))
    for i in range(len(r)):
        r[i], g[i], b[i] = _mix(start, r[i], factor), _mix(start, g[i], factor), _mix(start, b[i], factor)


@nb.njit(cache=True, nogil=True)
def _sum(plane):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(len(plane)):
        total += plane[i]
    return total


@nb.njit(cache=True, nogil=True, inline="always")
def _from_hue(hue, offset, value, saturation):  # type: ignore[no-untyped-def]
    """One channel of an HSV color; hue in sixths of a circle, 0 to 6."""
    k = hue + offset
    k = k - (np.float32(6) if k >= np.float32(6) else np.float32(0))
    share = min(max(min(k, np.float32(4) - k), np.float32(0)), np.float32(1))
    return np.uint8(np.int32(value - value * saturation * share + np.float32(0.5)))


@nb.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FINITE)
def _shift_hue(red, green, blue, shift):  # type: ignore[no-untyped-def]
    """Rotate the hue by shift / 255 as PIL's 8-bit HSV does, without a branch."""
    one, zero = np.float32(1), np.float32(0)
    for i in range(len(red)):
        r, g, b = np.float32(red[i]), np.float32(green[i]), np.float32(blue[i])
        value, low = max(r, max(g, b)), min(r, min(g, b))
        span = value - low
        inverse = np.float32(1 / 6) / max(span, one)
        saturation = np.floor(span / max(value, one) * np.float32(255)) * np.float32(1 / 255)
        from_red, from_green = (g - b) * inverse, np.float32(1 / 3) + (b - r) * inverse
        hue = from_red if r == value else (from_green if g == value else np.float32(2 / 3) + (r - g) * inverse)
        hue = hue + (one if hue < zero else zero)
        byte = (np.int32(hue * np.float32(255)) + np.int32(shift)) & np.int32(255)
        rotated = np.float32(byte) * np.float32(6 / 255)
        red[i] = _from_hue(rotated, np.float32(5), value, saturation)
        green[i] = _from_hue(rotated, np.float32(3), value, saturation)
        blue[i] = _from_hue(rotated, np.float32(1), value, saturation)


@nb.njit(cache=True, nogil=True)
def _gray(r, g, b):  # type: ignore[no-untyped-def]
    out = np.empty(len(r), np.uint8)
    for i in range(len(r)):
        out[i] = np.uint8(np.int32(_luma(r[i], g[i], b[i])))
    return out


@nb.njit(cache=True, nogil=True)
def _bell(sigma, most):  # type: ignore[no-untyped-def]
    """A Gaussian as integer weights of distance 0, 1, …, radius <= most; together, each side counted, they are `_ONE`."""
    radius = min(int(np.ceil(4 * sigma)), most)
    shares = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    shares *= _ONE / (2 * shares.sum() - shares[0])
    weights = np.zeros(radius + 1, np.uint16)
    running, given = 0.5, 0
    for k in range(radius, 0, -1):
        running += shares[k]
        weights[k] = int(running) - given
        given = int(running)
    weights[0] = _ONE - 2 * given
    while radius > 0 and weights[radius] == 0:
        radius -= 1
    return weights[: radius + 1]


@nb.njit(cache=True, nogil=True)
def _blur_along(source, start, stop, step, weights, out):  # type: ignore[no-untyped-def]
    """out[i] = the weighted mean of source[i + k * step] over k = -radius … radius, rounded, for i = start … stop - 1."""
    totals = np.empty(_BLOCK, np.uint16)
    for at in range(start, stop, _BLOCK):  # blocks stay in the nearest cache
        n = min(_BLOCK, stop - at)
        total, middle, part, w = totals[:n], source[at : at + n], out[at : at + n], weights[0]
        for i in range(n):
            total[i] = np.uint16(128 + w * middle[i])
        k = 1
        while k < len(weights):
            a, b, w = source[at - k * step : at - k * step + n], source[at + k * step : at + k * step + n], weights[k]
            k += 1
            if k < len(weights):
                c, d, v = source[at - k * step : at - k * step + n], source[at + k * step : at + k * step + n], weights[k]
                for i in range(n):
                    total[i] = np.uint16(total[i] + w * (a[i] + b[i]) + v * (c[i] + d[i]))
                k += 1
            else:
                for i in range(n):
                    total[i] = np.uint16(total[i] + w * (a[i] + b[i]))
        for i in range(n):
            part[i] = np.uint8(total[i] >> 8)


@nb.njit(cache=True, nogil=True)
def _blur(plane, size, sigma):  # type: ignore[no-untyped-def]
    """A Gaussian in place, borders reflected: along columns, then along rows, over the whole padded plane at once."""
    weights = _bell(sigma, size - 1)
    radius = len(weights) - 1
    if radius == 0:
        return
    stride, above = size + 2 * radius, radius * (size + 2 * radius)
    padded, smooth = np.empty(stride * stride, np.uint8), np.empty(stride * stride, np.uint8)
    for y in range(size):
        row, source = padded[above + y * stride : above + (y + 1) * stride], plane[y * size : (y + 1) * size]
        _copy(source, row[radius : radius + size])
        for k in range(1, radius + 1):
            row[radius - k], row[radius + size - 1 + k] = source[k], source[size - 1 - k]
    for k in range(1, radius + 1):
        top, bottom = above - k * stride, above + (size - 1 + k) * stride
        _copy(padded[above + k * stride : above + (k + 1) * stride], padded[top : top + stride])
        _copy(padded[above + (size - 1 - k) * stride : above + (size - k) * stride], padded[bottom : bottom + stride])
    _blur_along(padded, above, above + size * stride, stride, weights, smooth)
    _blur_along(smooth, above + radius, above + size * stride - radius, 1, weights, padded)
    for y in range(size):
        at = above + y * stride + radius
        _copy(padded[at : at + size], plane[y * size : (y + 1) * size])


@nb.njit(cache=True, nogil=True)
def _interleave(r, g, b, solarized, out):  # type: ignore[no-untyped-def]
    """Planes to pixels; solarized: values from 128 on are inverted."""
    flip = np.uint8(255 if solarized else 0)
    for i in range(len(r)):
        out[3 * i] = r[i] ^ (flip if r[i] >= 128 else np.uint8(0))
        out[3 * i + 1] = g[i] ^ (flip if g[i] >= 128 else np.uint8(0))
        out[3 * i + 2] = b[i] ^ (flip if b[i] >= 128 else np.uint8(0))
