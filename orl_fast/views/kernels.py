"""From decoded pixels to finished views, one call for many crops, without the GIL.

A crop is resized into planes that lie transposed, colored, blurred along its width, turned upright, blurred along its height, and written
out as pixels. All work is done in a few hundred kilobytes that stay in the second-level cache.
"""

from typing import Any

import numba as nb
import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from orl_fast.views.blur import blur_columns
from orl_fast.views.color import CONTRAST, TILE_PX, mean_gray, recolor, to_gray
from orl_fast.views.resize import padded, resize, transpose
from orl_fast.views.vector import TILE_ROWS


def _typed_pointer(_typing: Any, address: Any) -> Any:
    """An integer address as a pointer that `carray` takes: decoded images come as addresses, whatever their number."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_typed_pointer)


@nb.njit(cache=True, nogil=True)
def render_crops(  # type: ignore[no-untyped-def]
    samples,
    num_samples,
    addresses,
    regions,
    scales,
    places,
    boxes,
    beyond_box,
    flips,
    orders,
    factors,
    hues,
    grays,
    sigmas,
    solarized,
    sizes,
    out,
):
    """Render all views of samples[0] … samples[1] - 1.

    Args:
        num_samples: B; view v of sample b is crop v * B + b.
        addresses: [U] int64 of decoded RGB pixels; 0: could not be decoded, its crops are left as they are.
        regions: [U, 4] int64 xyxy, the part of its image that each decoded image holds.
        scales: [U, 2] float64, pixels per pixel of the image, x and y: below 1 where fewer are stored.
        places: [M] int64 into the three.
        boxes … solarized: as in `Crops`.
        sizes: [V] int64, side of each view.
        out: flat uint8; view by view [B, S, S, 3].
    """
    widest = 0
    for v in range(len(sizes)):
        for b in range(samples[0], samples[1]):
            place = places[v * num_samples + b]
            widest = max(widest, regions[place, 2] - regions[place, 0])
    most = padded(sizes.max())
    strip, turned = np.empty(TILE_ROWS * padded(3 * widest), np.uint8), np.empty(padded(3 * widest) * most, np.uint8)
    planes_memory, upright_memory = np.empty(3 * most * most, np.uint8), np.empty(3 * most * most, np.uint8)
    sums, tile = np.empty(most, np.uint32), np.empty((3, TILE_PX), np.float32)
    for b in range(samples[0], samples[1]):  # all views of a sample together: its image is in the cache from the first view on
        start = 0
        for v in range(len(sizes)):
            size, side = sizes[v], padded(sizes[v])
            view = out[start + b * size * size * 3 : start + (b + 1) * size * size * 3]
            start += num_samples * size * size * 3
            flat = planes_memory[: 3 * side * side].reshape(3, side * side)
            planes, upright = flat.reshape(3, side, side), upright_memory[: 3 * side * side].reshape(3, side, side)
            red, green, blue = flat[0][: size * side], flat[1][: size * side], flat[2][: size * side]
            m = v * num_samples + b
            region, address = regions[places[m]], addresses[places[m]]
            if address == 0:
                continue
            pixels = carray(_pointer(address), ((region[2] - region[0]) * (region[3] - region[1]) * 3,), np.uint8)
            x1, y1, x2, y2 = boxes[m]
            if not beyond_box:
                x1, y1, x2, y2 = np.rint(x1), np.rint(y1), np.rint(x2), np.rint(y2)
            scale_x, scale_y = scales[places[m]]
            box = x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y
            resize(pixels, region, box, beyond_box, size, flips[m], strip, turned, planes)
            ops, hue, split = orders[m], np.int64(hues[m] * 255), 0
            if factors[m, CONTRAST] != 1:  # it depends on all pixels as they are after what comes before it
                while ops[split] != CONTRAST:
                    split += 1
                recolor(red, green, blue, ops[:split], factors[m], hue, 0, tile)
            gray = mean_gray(planes, size) if factors[m, CONTRAST] != 1 else 0
            recolor(red, green, blue, ops[split:], factors[m], hue, gray, tile)
            num_planes = 3
            if grays[m]:
                to_gray(red, green, blue)
                num_planes = 1
            for c in range(num_planes):
                if sigmas[m] > 0:
                    blur_columns(planes[c], size, sigmas[m], sums[:side], upright[c])
                    transpose(upright[c], planes[c])
                    blur_columns(planes[c], size, sigmas[m], sums[:side], upright[c])
                else:
                    transpose(planes[c], upright[c])
            for y in range(size):
                row = view[y * size * 3 : (y + 1) * size * 3]
                _interleave(upright[0, y, :size], upright[num_planes // 2, y, :size], upright[num_planes - 1, y, :size], solarized[m], row)


@nb.njit(cache=True, nogil=True)
def _interleave(r, g, b, solarized, out):  # type: ignore[no-untyped-def]
    """Planes to pixels; solarized: values from 128 on are inverted."""
    flip = np.uint8(255 if solarized else 0)
    for i in range(len(r)):
        out[3 * i] = r[i] ^ (flip if r[i] >= 128 else np.uint8(0))
        out[3 * i + 1] = g[i] ^ (flip if g[i] >= 128 else np.uint8(0))
        out[3 * i + 2] = b[i] ^ (flip if b[i] >= 128 else np.uint8(0))
