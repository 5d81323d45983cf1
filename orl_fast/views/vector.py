"""Operations on blocks of bytes that loops do not express: LLVM's vector instructions, which it compiles for whatever processor there is.

Addresses and strides are integers, in bytes. Nothing is checked.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_BYTE, _SHORT, _WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)
TILE_ROWS, TILE_COLUMNS = 16, 32


def _pointer(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _constant(kind: Any, lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(kind, len(lanes)), lanes)


def _transpose(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
    source, source_stride, target, target_stride = arguments
    # Within each half of 16 bytes: the lower, or the upper, eight lanes of two rows, alternating. Four rounds of it transpose.
    lower, upper = (_constant(_WORD, [lane + 32 * row for half in (0, 16) for lane in range(half + at, half + at + 8) for row in (0, 1)])
                    for at in (0, 8))  # fmt: skip
    row_kind, half_kind = ir.VectorType(_BYTE, TILE_COLUMNS), ir.VectorType(_BYTE, TILE_ROWS)
    rows = []
    for y in range(TILE_ROWS):
        offset = builder.mul(source_stride, ir.Constant(source_stride.type, y))
        rows.append(builder.load(_pointer(builder, source, offset, row_kind), align=1))
    for _ in range(4):
        rows = [builder.shuffle_vector(rows[k // 2], rows[k // 2 + 8], upper if k % 2 else lower) for k in range(TILE_ROWS)]
    for x in range(TILE_COLUMNS):
        column = builder.shuffle_vector(rows[x % 16], rows[x % 16], _constant(_WORD, list(range(x // 16 * 16, x // 16 * 16 + 16))))
        offset = builder.mul(target_stride, ir.Constant(target_stride.type, x))
        builder.store(column, _pointer(builder, target, offset, half_kind), align=1)
    return _context.get_dummy_value()


def _transpose_tile(_typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """Write the 16 rows of 32 bytes at `source` as 32 rows of 16 bytes at `target`."""
    return types.void(types.intp, types.intp, types.intp, types.intp), _transpose


def _blend(width: int) -> Any:
    bytes_kind, sums_kind = ir.VectorType(_BYTE, 32), ir.VectorType(_SHORT, 32)
    rounding, eight, first = _constant(_SHORT, [128] * 32), _constant(_SHORT, [8] * 32), _constant(_WORD, [0] * 32)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        source, stride, count, weights, target = arguments
        sums = [cgutils.alloca_once_value(builder, rounding) for _ in range(0, width, 32)]  # type: ignore[no-untyped-call]
        offsets = [ir.Constant(source.type, at) for at in range(0, width, 32)]
        with cgutils.for_range(builder, count) as loop:
            place = builder.mul(loop.index, ir.Constant(source.type, 2))
            lane = builder.insert_element(
                ir.Constant(sums_kind, ir.Undefined), builder.load(_pointer(builder, weights, place, _SHORT)), _WORD(0)
            )
            weight = builder.shuffle_vector(lane, lane, first)
            row = builder.add(source, builder.mul(stride, loop.index))
            for total, offset in zip(sums, offsets, strict=True):
                values = builder.zext(builder.load(_pointer(builder, row, offset, bytes_kind), align=1), sums_kind)
                builder.store(builder.add(builder.load(total), builder.mul(values, weight)), total)
        for total, offset in zip(sums, offsets, strict=True):
            mean = builder.trunc(builder.lshr(builder.load(total), eight), bytes_kind)
            builder.store(mean, _pointer(builder, target, offset, bytes_kind), align=1)
        return context.get_dummy_value()

    return generate


def _blend_64(_typing: Any, source: Any, stride: Any, count: Any, weights: Any, target: Any) -> Any:
    """The weighted mean of `count` rows of 64 bytes, rounded; the weights are `count` uint16 that sum to 256."""
    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), _blend(64)


def _blend_32(_typing: Any, source: Any, stride: Any, count: Any, weights: Any, target: Any) -> Any:
    """The same with rows of 32 bytes."""
    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), _blend(32)


transpose_tile: Any = intrinsic(_transpose_tile)
blend_64: Any = intrinsic(_blend_64)
blend_32: Any = intrinsic(_blend_32)
