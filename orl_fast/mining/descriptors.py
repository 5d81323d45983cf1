"""Color and texture histograms of regions for selective search (Uijlings et al., IJCV 2013, section 3.2), as OpenCV computes them.

Texture is four derivatives per channel (Scharr, along the axes and the diagonals), each split into its positive and its negative part, each
part scaled over the whole image to 0-255 and put into 10 bins. A pixel is in one part only, so here one signed code of 20 values stands
for both; `region_histograms` unfolds it. Everything is counted once on atoms (see `segmentation`) and summed for each segmentation.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numba as nb
import numpy as np
from numba import float32, int32, int64, uint32, uint64

COLOR_BINS, TEXTURE_BINS = 25, 10
_COLOR = 3 * COLOR_BINS  # length of a color histogram
_TEXTURE = 3 * 4 * 2 * TEXTURE_BINS  # channels x derivatives x signs x bins
_CODES = _COLOR + _TEXTURE

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Atoms:
    """What is known of each of A atoms.

    Attributes:
        counts: [A, 315] int32: 3 x 25 color bins, then 3 channels x 4 derivatives x 20 signed codes.
        zero_bins: [12] int32, the bin of the value 0 in each negative part.
        sizes: [A] int32, pixels. boxes: [A, 4] int32 xyxy, half-open.
        pairs: [E] uint64, adjacent atoms as smaller << 32 | larger, each once.
    """

    counts: Array
    zero_bins: Array
    sizes: Array
    boxes: Array
    pairs: Array


def describe_atoms(image: Array, atoms: Array, num_atoms: int) -> Atoms:
    """Describe the atoms [H, W] of an image [H, W, 3] uint8."""
    height, width = image.shape[:2]
    flat = (height, 3 * width)
    straight = [cv2.Scharr(image, cv2.CV_16S, dx, dy).reshape(flat) for dx, dy in ((1, 0), (0, 1))]
    diagonal = _diagonal_derivatives(image)
    low, high = np.empty((12,), np.float64), np.empty((12,), np.float64)
    for i, plane in enumerate((*straight, *diagonal)):
        low[i::4], high[i::4] = _extrema(plane)
    scales, zero_bins = _part_scales(low, high)
    counts = _count_codes(image.reshape(flat), *straight, *diagonal, scales, atoms, num_atoms)
    sizes, boxes, pairs = _geometry(atoms, num_atoms)
    return Atoms(counts=counts, zero_bins=zero_bins, sizes=sizes, boxes=boxes, pairs=pairs)


def _diagonal_derivatives(image: Array) -> list[Array]:
    """Two planes [H, 3 W] float32: Scharr derivatives of the image turned by 45 degrees, turned back.

    The turned plane is rounded to uint8; the way back turns about a whole pixel and is cropped by half the difference in size.
    """
    height, width = image.shape[:2]
    center = (width / 2, height / 2)
    turned_width, turned_height = cv2.RotatedRect(center, (width, height), 45.0).boundingRect()[2:]
    forth = cv2.getRotationMatrix2D(center, 45.0, 1.0)
    forth[:, 2] += (turned_width / 2 - center[0], turned_height / 2 - center[1])
    turned = cv2.warpAffine(image, forth, (turned_width, turned_height))
    dx, dy = cv2.Scharr(turned, cv2.CV_16S, 1, 0), cv2.Scharr(turned, cv2.CV_16S, 0, 1)
    back = cv2.invertAffineTransform(cv2.getRotationMatrix2D((turned_width // 2, turned_height // 2), -45.0, 1.0)).astype(np.float32)
    # A narrow image is longer than its turned bounding box: OpenCV starts at 0 there.
    left, top = max(0, turned_width - width) // 2, max(0, turned_height - height) // 2
    rows = np.arange(top, top + height, dtype=np.float32)[:, None]
    starts = rows * back[:, 1] + back[:, 2]  # here, not in the kernel: OpenCV rounds between these two, and fuses the next two
    return [_turn_back(plane, back, starts, left, width) for plane in (dx, dy)]


@nb.njit(cache=True, nogil=True, inline="always")
def _at(plane, y, x, c):  # type: ignore[no-untyped-def]
    inside = (y >= 0) & (x >= 0) & (y < plane.shape[0]) & (x < plane.shape[1])
    return float32(plane[y, x, c]) if inside else float32(0)


@nb.njit(cache=True, nogil=True, inline="always")
def _bilinear(a, b, c, d, u, v):  # type: ignore[no-untyped-def]
    upper = float32(a) + u * (float32(b) - float32(a))
    lower = float32(c) + u * (float32(d) - float32(c))
    return upper + v * (lower - upper)


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _turn_back(plane: Array, matrix: Array, starts: Array, left: int, width: int) -> Array:
    """[H, 3 W] float32 bilinear samples of a plane [H', W', 3] int16, zero outside, with fused multiply-adds as in cv2.warpAffine."""
    turned_height, turned_width, _ = plane.shape
    flat, down = plane.reshape(-1), uint64(3 * turned_width)
    out = np.empty((len(starts), 3 * width), np.float32)
    for y in range(len(starts)):
        row, start_x, start_y = out[y], starts[y, 0], starts[y, 1]
        for x in range(width):
            source_x, source_y = float32(x + left) * matrix[0, 0] + start_x, float32(x + left) * matrix[1, 0] + start_y
            floor_x, floor_y = np.floor(source_x), np.floor(source_y)
            u, v, ix, iy = source_x - floor_x, source_y - floor_y, int64(floor_x), int64(floor_y)
            if (ix >= 0) & (iy >= 0) & (ix < turned_width - 1) & (iy < turned_height - 1):
                at = uint64(3 * (iy * turned_width + ix))
                for c in range(uint64(3)):
                    a, b = flat[at + c], flat[at + uint64(3) + c]
                    row[uint64(3) * uint64(x) + c] = _bilinear(a, b, flat[at + down + c], flat[at + down + uint64(3) + c], u, v)
            else:
                for c in range(3):
                    a, b = _at(plane, iy, ix, c), _at(plane, iy, ix + 1, c)
                    row[3 * x + c] = _bilinear(a, b, _at(plane, iy + 1, ix, c), _at(plane, iy + 1, ix + 1, c), u, v)
    return out


@nb.njit(cache=True, nogil=True)
def _extrema(plane: Array) -> tuple[Array, Array]:
    """Minimum and maximum of each channel of an interleaved plane [H, 3 W]."""
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


def _part_scales(low: Array, high: Array) -> tuple[Array, Array]:
    """[12, 4] float32: factor and offset of the positive part, then of the negative, that scale each to 0-255; and the zero bins.

    A part that is constant (a flat image) has no range to scale by, where OpenCV divides by zero and gets bin 0: factor and offset are 0.
    """
    scales = np.zeros((len(low), 4), np.float32)
    for column, clip in ((0, np.maximum), (2, np.minimum)):
        least, most = clip(low, 0.0), clip(high, 0.0)
        some = most > least
        scales[some, column] = 255.0 / (most - least)[some]
        scales[some, column + 1] = -255.0 * least[some] / (most - least)[some]
    return scales, (np.rint(scales[:, 3]).astype(np.int32) * TEXTURE_BINS) >> 8


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _texture_codes(values: Array, scale: Array, out: Array) -> None:
    """Signed codes of a row: bin of the positive part, or 10 + bin of the negative part. scale: [5, 3 W], the last row the first code."""
    for i in range(len(values)):
        value = float32(values[i])
        negative = value < float32(0)
        level = value * (scale[2, i] if negative else scale[0, i]) + (scale[3, i] if negative else scale[1, i])
        code = (int32(np.rint(level)) * int32(TEXTURE_BINS)) >> int32(8)
        out[i] = code + int32(scale[4, i]) + (int32(TEXTURE_BINS) if negative else int32(0))


@nb.njit(cache=True, nogil=True)
def _count_codes(
    image: Array, dx: Array, dy: Array, diagonal_x: Array, diagonal_y: Array, scales: Array, atoms: Array, num_atoms: int
) -> Array:
    """[A, 315] int32: how many pixels of each atom have each code; planes are [H, 3 W], interleaved."""
    height, width = atoms.shape
    counts = np.zeros((num_atoms, _CODES), np.int32)
    codes = np.empty((5, 3 * width), np.uint32)
    scale = np.empty((4, 5, 3 * width), np.float32)
    for i in range(3 * width):
        for derivative in range(4):
            plane = 4 * (i % 3) + derivative
            scale[derivative, :4, i] = scales[plane]
            scale[derivative, 4, i] = _COLOR + 2 * TEXTURE_BINS * plane
    color_base = (np.arange(3 * width) % 3 * COLOR_BINS).astype(np.uint32)
    for y in range(height):
        pixels, color = image[y], codes[0]
        for i in range(3 * width):
            color[i] = ((uint32(pixels[i]) * uint32(COLOR_BINS)) >> uint32(8)) + color_base[i]
        _texture_codes(dx[y], scale[0], codes[1])
        _texture_codes(dy[y], scale[1], codes[2])
        _texture_codes(diagonal_x[y], scale[2], codes[3])
        _texture_codes(diagonal_y[y], scale[3], codes[4])
        row = atoms[y]
        for x in range(width):
            histogram = counts[row[x]]
            for kind in range(5):
                three = codes[kind, 3 * x : 3 * x + 3]
                histogram[three[0]] += 1
                histogram[three[1]] += 1
                histogram[three[2]] += 1
    return counts


@nb.njit(cache=True, nogil=True, inline="always")
def _remember(pairs, n, recent, one, other):  # type: ignore[no-untyped-def]
    """Append a pair of adjacent atoms unless it was seen lately; returns the new length."""
    pair = (uint64(min(one, other)) << uint64(32)) | uint64(max(one, other))
    slot = (pair * uint64(0x9E3779B97F4A7C15)) >> uint64(52)
    if recent[slot] == pair:
        return n
    recent[slot] = pair
    pairs[n] = pair
    return n + 1


@nb.njit(cache=True, nogil=True)
def _geometry(atoms: Array, num_atoms: int) -> tuple[Array, Array, Array]:
    """Sizes, boxes and adjacent pairs, run by run.

    OpenCV takes the left, upper and upper left neighbor of each pixel that is neither in the first row nor in the first column.
    """
    height, width = atoms.shape
    sizes = np.zeros(num_atoms, np.int32)
    boxes = np.empty((num_atoms, 4), np.int32)
    boxes[:, 0], boxes[:, 1], boxes[:, 2:] = width, height, 0
    pairs, n = np.empty(3 * height * width, np.uint64), 0  # what is not written takes no memory
    recent = np.full(4096, ~uint64(0))
    for y in range(height):
        row, above = atoms[y], atoms[max(y - 1, 0)]
        start = 0
        while start < width:
            atom = row[start]
            stop = start + 1
            while stop < width and row[stop] == atom:
                stop += 1
            sizes[atom] += stop - start
            box = boxes[atom]
            box[0], box[1], box[2], box[3] = min(box[0], start), min(box[1], y), max(box[2], stop), y + 1
            if y > 0 and stop > 1:
                if start > 0:
                    n = _remember(pairs, n, recent, row[start - 1], atom)
                last = atom
                for x in range(max(start, 1) - 1, stop):
                    if above[x] != last:
                        last = above[x]
                        if last != atom:
                            n = _remember(pairs, n, recent, last, atom)
            start = stop
    return sizes, boxes, np.unique(pairs[:n])
