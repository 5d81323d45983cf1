"""Color and texture histograms of regions for selective search (Uijlings et al., IJCV 2013, section 3.2), as OpenCV computes them.

Texture is four derivatives per channel (Scharr, along the axes and the diagonals), each split into its positive and its negative part, each
part scaled over the whole image to 0-255 and put into 10 bins. A pixel is in one part only, so here one signed code of 20 values stands
for both; `region_histograms` unfolds it. Everything is counted once on atoms (see `segmentation`) and summed for each segmentation.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np
from numba import float32, int32, uint32, uint64

from orl_fast.selective_search.gradients import derivatives, extrema
from orl_fast.selective_search.scratch import Array, Scratch

COLOR_BINS, TEXTURE_BINS = 25, 10
_COLOR = 3 * COLOR_BINS  # length of a color histogram
_TEXTURE = 3 * 4 * 2 * TEXTURE_BINS  # channels x derivatives x signs x bins
_CODES = _COLOR + _TEXTURE
_BINS_PER_LEVEL = np.float32(TEXTURE_BINS / 256)  # exact, and so is its product with 0 to 255


@dataclass(frozen=True, kw_only=True)
class Atoms:
    """Properties of A atoms.

    Attributes:
        counts: [A, 315] int32: 3 x 25 color bins, then 3 channels x 4 derivatives x 20 signed codes; in the scratch buffers.
        zero_bins: [12] int32, the bin of the value 0 in each negative part.
        sizes: [A] int32, pixels. boxes: [A, 4] int32 xyxy, half-open.
        pairs: [E] uint64, adjacent atoms as smaller << 32 | larger, each once.
    """

    counts: Array
    zero_bins: Array
    sizes: Array
    boxes: Array
    pairs: Array


def describe_atoms(image: Array, atoms: Array, num_atoms: int, scratch: Scratch) -> Atoms:
    """Describe the atoms [H, W] of an image [H, W, 3] uint8."""
    planes = derivatives(image, scratch)
    low, high = np.empty(12, np.float64), np.empty(12, np.float64)
    for i, plane in enumerate(planes):
        low[i::4], high[i::4] = extrema(plane)
    scales, zero_bins = _part_scales(low, high)
    counts = scratch.take("counts", (num_atoms, _CODES), np.int32)
    dx, dy, diagonal_x, diagonal_y = planes
    _count_codes(image.reshape(len(image), -1), dx, dy, diagonal_x, diagonal_y, scales, atoms, counts)
    sizes, boxes, pairs = _geometry(atoms, num_atoms)
    return Atoms(counts=counts, zero_bins=zero_bins, sizes=sizes, boxes=boxes, pairs=pairs)


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
    for i in range(len(values)):  # both codes, then a choice: only so does the loop become vector code
        value = float32(values[i])
        positive = np.floor(np.rint(value * scale[0, i] + scale[1, i]) * _BINS_PER_LEVEL)
        negative = np.floor(np.rint(value * scale[2, i] + scale[3, i]) * _BINS_PER_LEVEL) + float32(TEXTURE_BINS)
        out[i] = int32(scale[4, i] + (negative if value < float32(0) else positive))


@nb.njit(cache=True, nogil=True)
def _count_codes(
    image: Array, dx: Array, dy: Array, diagonal_x: Array, diagonal_y: Array, scales: Array, atoms: Array, counts: Array
) -> None:
    """Fill counts [A, 315]: how many pixels of each atom have each code; planes are [H, 3 W], interleaved."""
    height, width = atoms.shape
    counts[:] = 0
    codes = np.empty((5, 3 * width), np.uint32)
    flat, flat_codes = counts.reshape(-1), codes.reshape(-1)
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
        for x in range(uint64(width)):
            start = uint64(row[x]) * uint64(_CODES)
            for kind in range(uint64(5)):
                for c in range(uint64(3)):
                    flat[start + flat_codes[(kind * uint64(width) + x) * uint64(3) + c]] += int32(1)


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
