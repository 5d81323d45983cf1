"""Color and texture histograms of regions for selective search (Uijlings et al., IJCV 2013, section 3.2), as OpenCV computes them.

Texture is four derivatives per channel (Scharr, along the axes and the diagonals), each split into its positive and its negative part, each
part scaled over the whole image to 0-255 and put into 10 bins. A pixel is in one part only, so here one signed code of 20 values stands
for both; `grouping` unfolds it. Everything is counted once on atoms (see `segmentation`) and summed for each segmentation.
"""

from typing import NamedTuple

import cv2
import numba as nb
import numpy as np
from numba import float32, int32, uint32, uint64

from orl_fast.selective_search.scratch import Array, Scratch
from orl_fast.selective_search.segmentation import RECENT, remember_pair

COLOR_BINS, TEXTURE_BINS = 25, 10
_COLOR = 3 * COLOR_BINS  # length of a color histogram
_CODES = _COLOR + 3 * 4 * 2 * TEXTURE_BINS  # channels x derivatives x signs x bins
_BINS_PER_LEVEL = np.float32(TEXTURE_BINS / 256)  # exact, and so is its product with 0 to 255


class Atoms(NamedTuple):
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
    low = np.stack([cv2.reduce(plane, 0, cv2.REDUCE_MIN) for plane in planes]).reshape(4, -1, 3).min(1)
    high = np.stack([cv2.reduce(plane, 0, cv2.REDUCE_MAX) for plane in planes]).reshape(4, -1, 3).max(1)
    scales, zero_bins = _part_scales(low.T.reshape(-1).astype(np.float64), high.T.reshape(-1).astype(np.float64))
    counts = scratch.take("counts", (num_atoms, _CODES), np.int32)
    _count_codes(image.reshape(len(image), -1), planes, scales, atoms, counts)
    return Atoms(counts, zero_bins, *_geometry(atoms, num_atoms))


def derivatives(image: Array, scratch: Scratch) -> Array:
    """[4, H, 3 W] float32 of an image [H, W, 3] uint8, channels interleaved: dx, dy and both diagonals, in the scratch buffers.

    The diagonal ones are Scharr derivatives of the image rotated by 45 degrees and rounded to uint8, rotated back about a whole pixel and
    cropped by half the difference in size, both ways bilinear with zeros outside. OpenCV rotates the whole bounding box back, twice the
    image; here cv2.remap samples the image's part, at coordinates rounded as cv2.warpAffine rounds them: equal to the last bit.
    """
    height, width = image.shape[:2]
    planes = scratch.take("planes", (4, *image.shape), np.float32)
    center = (width / 2, height / 2)
    box = cv2.RotatedRect(center, (width, height), 45.0).boundingRect()[2:]
    rotation = cv2.getRotationMatrix2D(center, 45.0, 1.0)
    rotation[:, 2] += (box[0] / 2 - center[0], box[1] / 2 - center[1])
    rotated = cv2.warpAffine(image, rotation, box, dst=scratch.take("rotated image", (box[1], box[0], 3), np.uint8))
    back = cv2.invertAffineTransform(cv2.getRotationMatrix2D((box[0] // 2, box[1] // 2), -45.0, 1.0)).astype(np.float32)
    # A narrow image is longer than its rotated bounding box: OpenCV starts at 0 there.
    left, top = max(0, box[0] - width) // 2, max(0, box[1] - height) // 2
    starts = np.arange(top, top + height, dtype=np.float32)[:, None] * back[:, 1] + back[:, 2]
    steps = np.arange(left, left + width)[:, None] * back[:, 0].astype(np.float64)  # the sums are rounded once, as by fused multiply-add
    source_x, source_y = (scratch.take(f"source {axis}", (height, width), np.float32) for axis in (0, 1))
    np.add(starts[:, None, 0], steps[:, 0], out=source_x, casting="same_kind")
    np.add(starts[:, None, 1], steps[:, 1], out=source_y, casting="same_kind")
    derivative = scratch.take("rotated derivative", rotated.shape, np.float32)
    for axis in (0, 1):
        cv2.Scharr(image, cv2.CV_32F, 1 - axis, axis, dst=planes[axis])
        cv2.Scharr(rotated, cv2.CV_32F, 1 - axis, axis, dst=derivative)
        cv2.remap(derivative, source_x, source_y, cv2.INTER_LINEAR, dst=planes[2 + axis])
    return planes.reshape(4, height, 3 * width)


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
        value = values[i]
        positive = np.floor(np.rint(value * scale[0, i] + scale[1, i]) * _BINS_PER_LEVEL)
        negative = np.floor(np.rint(value * scale[2, i] + scale[3, i]) * _BINS_PER_LEVEL) + float32(TEXTURE_BINS)
        out[i] = int32(scale[4, i] + (negative if value < float32(0) else positive))


@nb.njit(cache=True, nogil=True)
def _count_codes(image: Array, planes: Array, scales: Array, atoms: Array, counts: Array) -> None:
    """Fill counts [A, 315]: how many pixels of each atom have each code. image [H, 3 W]."""
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
        for derivative in range(4):
            _texture_codes(planes[derivative, y], scale[derivative], codes[1 + derivative])
        row = atoms[y]
        for x in range(uint64(width)):
            start = uint64(row[x]) * uint64(_CODES)
            for kind in range(uint64(5)):
                for c in range(uint64(3)):
                    flat[start + flat_codes[(kind * uint64(width) + x) * uint64(3) + c]] += int32(1)


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
    recent = np.full(RECENT, ~uint64(0))
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
                    n = remember_pair(pairs, n, recent, row[start - 1], atom)
                last = atom
                for x in range(max(start, 1) - 1, stop):
                    if above[x] != last:
                        last = above[x]
                        if last != atom:
                            n = remember_pair(pairs, n, recent, last, atom)
            start = stop
    return sizes, boxes, np.unique(pairs[:n])
