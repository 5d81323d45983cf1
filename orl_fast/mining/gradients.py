"""Derivatives along the axes and the diagonals, as OpenCV computes them for selective search's texture.

The diagonal ones are Scharr derivatives of the plane turned by 45 degrees and rounded to uint8, turned back about a whole pixel and cropped
by half the difference in size, both ways bilinear with zeros outside. The way back is our own: cv2.warpAffine would turn the whole bounding
box, twice the image. It does the same operations in the same order, fused where OpenCV fuses, so its values are equal to the last bit.
"""

from typing import Any

import cv2
import numba as nb
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import float32, int64, types, uint64
from numba.extending import intrinsic

from orl_fast.mining.scratch import Scratch

Array = np.ndarray[Any, Any]


def derivatives(image: Array, scratch: Scratch) -> list[Array]:
    """Four planes [H, 3 W] of an image [H, W, 3] uint8, channels interleaved: dx, dy (int16) and both diagonals (float32)."""
    height, width = image.shape[:2]
    planes = [_scharr(image, axis, f"straight {axis}", scratch).reshape(height, 3 * width) for axis in (0, 1)]
    center = (width / 2, height / 2)
    turned_width, turned_height = cv2.RotatedRect(center, (width, height), 45.0).boundingRect()[2:]
    forth = cv2.getRotationMatrix2D(center, 45.0, 1.0)
    forth[:, 2] += (turned_width / 2 - center[0], turned_height / 2 - center[1])
    # Four channels: a pixel's derivatives are then one aligned vector.
    padded = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA, dst=scratch.take("padded", (height, width, 4), np.uint8))
    turned = scratch.take("turned image", (turned_height, turned_width, 4), np.uint8)
    turned = cv2.warpAffine(padded, forth, (turned_width, turned_height), dst=turned)
    back = cv2.invertAffineTransform(cv2.getRotationMatrix2D((turned_width // 2, turned_height // 2), -45.0, 1.0)).astype(np.float32)
    # A narrow image is longer than its turned bounding box: OpenCV starts at 0 there.
    left, top = max(0, turned_width - width) // 2, max(0, turned_height - height) // 2
    rows = np.arange(top, top + height, dtype=np.float32)[:, None]
    starts = rows * back[:, 1] + back[:, 2]  # here, not in the kernel: OpenCV rounds between these two operations
    dx, dy = (_scharr(turned, axis, f"turned {axis}", scratch) for axis in (0, 1))
    out_x, out_y = (scratch.take(f"diagonal {axis}", (3 * height * width + 1,), np.float32) for axis in (0, 1))
    _turn_back(dx, dy, back, starts, left, out_x, out_y)
    return planes + [out[:-1].reshape(height, 3 * width) for out in (out_x, out_y)]


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
def _turn_back(dx: Array, dy: Array, matrix: Array, starts: Array, left: int, out_x: Array, out_y: Array) -> None:
    """Sample two planes [H', W', 4] int16 at the turned pixels; the outputs [3 H W + 1] have one element more for the padding lane."""
    turned_height, turned_width, _ = dx.shape
    flat_x, flat_y, down = dx.reshape(-1), dy.reshape(-1), uint64(4 * turned_width)
    width = (len(out_x) - 1) // (3 * len(starts))
    step_x, step_y = matrix[0, 0], matrix[1, 0]
    to = uint64(0)
    for y in range(len(starts)):
        start_x, start_y = starts[y, 0], starts[y, 1]
        for x in range(width):
            source_x, source_y = float32(x + left) * step_x + start_x, float32(x + left) * step_y + start_y
            floor_x, floor_y = np.floor(source_x), np.floor(source_y)
            u, v, ix, iy = source_x - floor_x, source_y - floor_y, int64(floor_x), int64(floor_y)
            if (ix >= 0) & (iy >= 0) & (ix < turned_width - 1) & (iy < turned_height - 1):
                at = uint64(4 * (iy * turned_width + ix))
                _blend(flat_x, at, down, u, v, out_x, to)  # type: ignore[call-arg]
                _blend(flat_y, at, down, u, v, out_y, to)  # type: ignore[call-arg]
            else:
                for c in range(uint64(3)):
                    out_x[to + c] = _blend_at_border(dx, ix, iy, c, u, v)
                    out_y[to + c] = _blend_at_border(dy, ix, iy, c, u, v)
            to += uint64(3)


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _blend_at_border(plane, x, y, c, u, v):  # type: ignore[no-untyped-def]
    upper_left, upper_right = _at(plane, y, x, c), _at(plane, y, x + 1, c)
    lower_left, lower_right = _at(plane, y + 1, x, c), _at(plane, y + 1, x + 1, c)
    upper, lower = upper_left + u * (upper_right - upper_left), lower_left + u * (lower_right - lower_left)
    return upper + v * (lower - upper)


@nb.njit(cache=True, nogil=True, inline="always")
def _at(plane, y, x, c):  # type: ignore[no-untyped-def]
    inside = (y >= 0) & (x >= 0) & (y < plane.shape[0]) & (x < plane.shape[1])
    return float32(plane[y, x, c]) if inside else float32(0)


@intrinsic
def _blend(typing_context: Any, source: Any, at: Any, down: Any, u: Any, v: Any, target: Any, to: Any) -> Any:
    """target[to : to + 4] = bilinear blend of source[at : at + 4], the pixel to its right and the two below, as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_type, *_, target_type, _ = signature.args
        source, at, down, u, v, target, to = arguments
        shorts = context.make_array(source_type)(context, builder, source)
        floats = context.make_array(target_type)(context, builder, target)
        vector, lanes = ir.VectorType(ir.FloatType(), 4), ir.VectorType(ir.IntType(16), 4)
        undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
        fma = builder.module.declare_intrinsic("llvm.fma.v4f32", fnty=ir.FunctionType(vector, [vector] * 3))

        def corner(index: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(shorts.data, [index]), lanes.as_pointer()))
            loaded.align = 2
            return builder.sitofp(loaded, vector)

        def splat(scalar: Any) -> Any:
            return builder.shuffle_vector(builder.insert_element(undefined, scalar, zeros.type.element(0)), undefined, zeros)

        def mix(a: Any, b: Any, weight: Any) -> Any:
            return builder.call(fma, [weight, builder.fsub(b, a), a])

        right, below = at.type(4), builder.add(at, down)
        upper = mix(corner(at), corner(builder.add(at, right)), splat(u))
        lower = mix(corner(below), corner(builder.add(below, right)), splat(u))
        blended = mix(upper, lower, splat(v))
        stored = builder.store(blended, builder.bitcast(builder.gep(floats.data, [to]), vector.as_pointer()))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(source, types.uint64, types.uint64, types.float32, types.float32, target, types.uint64), generate
