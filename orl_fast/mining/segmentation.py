"""Graph-based segmentation at three scales at once (Felzenszwalb & Huttenlocher, IJCV 2004), as OpenCV computes it.

Edges of the 4-connected pixel graph in ascending order; components A and B join over an edge of weight w if w <= w_last(A) + k / |A|
and likewise for B. What the three scales k decide alike is decided once: a *core* grows as long as every k accepts its edges. The first
edge on which they differ freezes both cores, and the edges that are left, between cores, are replayed for each k. This is exact: up to
that edge a frozen core is the same component in all three runs, every later edge that touches it is replayed, and of several edges
between the same two cores only the first can decide anything (accepted, it makes the others inner edges; rejected, one side is final).
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numba as nb
import numpy as np
from numba import float32, uint32, uint64

SCALES = (150.0, 300.0, 450.0)
MIN_SIZE_PX = 100
_SIGMA_PX = float(np.float32(0.8))  # OpenCV passes it as float32; the kernel's last digits decide edges
_LOW_K, _HIGH_K = np.float32(SCALES[0]), np.float32(SCALES[-1])
_NONE = np.uint32(0xFFFFFFFF)
_BLOCK = 512  # edges whose components are looked up together, so that their cache misses overlap
_RECENT = 8192  # direct-mapped memory of recent pairs of cores; a miss only costs a duplicate

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Segmentations:
    """Three segmentations of one image, over their common refinement.

    Attributes:
        atoms: [H, W] uint32, the intersection of the three label maps.
        regions: for each k, [A] uint32: the region that holds an atom; ids in raster order.
        num_regions: for each k.
    """

    atoms: Array
    regions: tuple[Array, ...]
    num_regions: tuple[int, ...]


def segment(image: Array) -> Segmentations:
    """Segment an image [H, W, 3] uint8 with k = 150, 300, 450, sigma 0.8 and regions of at least 100 pixels (section 4)."""
    height, width = image.shape[:2]
    blurred = cv2.GaussianBlur(image.astype(np.float32), (0, 0), _SIGMA_PX)
    forest = _grow_cores(_sort_edges(_edges(blurred)), width, height * width)
    core_of_pixel, sizes, last, first, second, weights = _number_cores(*forest)
    labels, counts = zip(*(_segment_cores(sizes, last, first, second, weights, np.float32(k)) for k in SCALES), strict=True)
    atom_of_core, regions = _intersect(*labels, counts[0])
    return Segmentations(atoms=atom_of_core[core_of_pixel].reshape(height, width), regions=tuple(regions), num_regions=counts)


@nb.njit(cache=True, nogil=True)
def _edges(blurred: Array) -> Array:
    """[E] uint64: the weight's float32 bits in the upper half, 2 * pixel + (0 to the right, 1 down) in the lower."""
    height, width, _ = blurred.shape
    edges = np.empty(height * (width - 1) + (height - 1) * width, np.uint64)
    weight = np.empty(width, np.float32)
    bits = weight.view(np.uint32)
    n = 0
    for y in range(height):
        for down in range(2):
            row = blurred[y]
            other = row[1:] if down == 0 else blurred[min(y + 1, height - 1)]
            count = width - 1 if down == 0 else (width if y + 1 < height else 0)
            for x in range(count):
                total = float32(0)
                for c in range(3):
                    difference = np.float64(other[x, c] - row[x, c])
                    total = float32(np.float64(total) + difference * difference)
                weight[x] = np.sqrt(total)
            out = edges[n : n + count]
            for x in range(count):
                out[x] = (uint64(bits[x]) << uint64(32)) | uint64(2 * (y * width + x) + down)
            n += count
    return edges


@nb.njit(cache=True, nogil=True)
def _sort_edges(edges: Array) -> Array:
    """Stable radix sort by weight, 3 digits of 11 bits; floats >= 0 sort like their bits. Overwrites its argument."""
    counts = np.zeros((3, 2048), np.uint32)
    low, middle, high = counts[0], counts[1], counts[2]
    words = edges.view(np.uint32)
    for i in range(len(edges)):
        key = words[2 * i + 1]
        low[key & uint32(2047)] += uint32(1)
        middle[(key >> uint32(11)) & uint32(2047)] += uint32(1)
        high[key >> uint32(22)] += uint32(1)
    source, target = edges, np.empty_like(edges)
    for digit in range(3):
        position = counts[digit]
        total = uint32(0)
        for i in range(2048):
            count = position[i]
            position[i] = total
            total += count
        shift = uint64(32 + 11 * digit)
        for i in range(len(source)):
            edge = source[i]
            bucket = uint32(edge >> shift) & uint32(2047)
            place = position[bucket]
            target[place] = edge
            position[bucket] = place + uint32(1)
        source, target = target, source
    return source


@nb.njit(cache=True, nogil=True, inline="always")
def _root(parent, node):  # type: ignore[no-untyped-def]
    found = parent[node]
    up = parent[found]
    while up != found:
        found = up
        up = parent[found]
    return found


@nb.njit(cache=True, nogil=True)
def _grow_cores(edges: Array, width: int, num_pixels: int) -> tuple[Array, Array, Array, Array, Array]:
    """Join what every k joins.

    Returns:
        parent: [N] uint32 union-find forest. state: [N, 4] float32 of each root: the thresholds w_last + k / size for the smallest and the
        largest k, w_last, and the size as uint32 bits. first, second, weights: [M] the edges that some k does not accept, in order.
    """
    parent = np.empty(num_pixels, np.uint32)
    state = np.empty((num_pixels, 4), np.float32)
    size = state.view(np.uint32)
    for i in range(num_pixels):
        parent[i] = i
        state[i, 0], state[i, 1], state[i, 2] = _LOW_K, _HIGH_K, 0
        size[i, 3] = 1
    first, second = np.empty(len(edges), np.uint32), np.empty(len(edges), np.uint32)
    weights = np.empty(len(edges), np.float32)
    recent = np.full(_RECENT, ~uint64(0))
    block_first, block_second = np.empty(_BLOCK + 1, np.uint32), np.empty(_BLOCK + 1, np.uint32)
    block_weight = np.empty(_BLOCK + 1, np.float32)
    offset = np.array([1, width], np.uint32)
    words, floats = edges.view(np.uint32), edges.view(np.float32)
    n = 0
    for start in range(0, len(edges), _BLOCK):
        stop = min(start + _BLOCK, len(edges))
        word, weight = words[2 * start : 2 * stop], floats[2 * start : 2 * stop]
        live = 0
        for i in range(stop - start):  # no branch: most edges lie within a component already and drop out here
            pixel = word[2 * i] >> uint32(1)
            neighbor = pixel + offset[word[2 * i] & uint32(1)]
            a, b = _root(parent, pixel), _root(parent, neighbor)
            parent[pixel], parent[neighbor] = a, b
            block_first[live], block_second[live], block_weight[live] = a, b, weight[2 * i + 1]
            live += a != b
        for i in range(live):
            a, b, w = _root(parent, block_first[i]), _root(parent, block_second[i]), block_weight[i]
            if a == b:
                continue
            if w <= min(state[a, 0], state[b, 0]):
                total = size[a, 3] + size[b, 3]
                if size[a, 3] < size[b, 3]:
                    a, b = b, a
                parent[b] = a
                size[a, 3] = total
                state[a, 0], state[a, 1], state[a, 2] = w + _LOW_K / float32(total), w + _HIGH_K / float32(total), w
                continue
            if w <= min(state[a, 1], state[b, 1]):  # some k accept it: from here on both are decided per k
                state[a, 0], state[a, 1] = -1, np.inf
                state[b, 0], state[b, 1] = -1, np.inf
            pair = (uint64(min(a, b)) << uint64(32)) | uint64(max(a, b))
            slot = (pair * uint64(0x9E3779B97F4A7C15)) >> uint64(51)
            if recent[slot] != pair:
                recent[slot] = pair
                first[n], second[n], weights[n] = a, b, w
                n += 1
    return parent, state, first[:n], second[:n], weights[:n]


@nb.njit(cache=True, nogil=True)
def _number_cores(
    parent: Array, state: Array, first: Array, second: Array, weights: Array
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Number the cores in raster order: core of each pixel [N], sizes and w_last [C], and the edges [M] between cores."""
    size = state.view(np.uint32)
    number = np.full(len(parent), _NONE)
    core_of_pixel = np.empty(len(parent), np.uint32)
    sizes, last = np.empty(len(parent), np.uint32), np.empty(len(parent), np.float32)
    n = uint32(0)
    for pixel in range(len(parent)):
        root = _root(parent, pixel)
        if number[root] == _NONE:
            number[root] = n
            sizes[n], last[n] = size[root, 3], state[root, 2]
            n += uint32(1)
        core_of_pixel[pixel] = number[root]
    a, b, w = np.empty_like(first), np.empty_like(first), np.empty_like(weights)
    m = 0
    for i in range(len(first)):
        a[m], b[m], w[m] = core_of_pixel[first[i]], core_of_pixel[second[i]], weights[i]
        m += a[m] != b[m]
    return core_of_pixel, sizes[:n].copy(), last[:n].copy(), a[:m].copy(), b[:m].copy(), w[:m].copy()


@nb.njit(cache=True, nogil=True)
def _segment_cores(sizes: Array, last: Array, first: Array, second: Array, weights: Array, k: float) -> tuple[Array, int]:
    """The segmentation for one k: join cores by the criterion, then regions below the minimum size; [C] uint32 labels, their number."""
    num_cores = len(sizes)
    parent, size = np.arange(num_cores).astype(np.uint32), sizes.copy()
    threshold = np.empty(num_cores, np.float32)
    for i in range(num_cores):
        threshold[i] = last[i] + k / float32(size[i])
    a_left, b_left = np.empty(len(first) + 1, np.uint32), np.empty(len(first) + 1, np.uint32)
    n = 0
    for i in range(len(first)):
        a, b, w = _root(parent, first[i]), _root(parent, second[i]), weights[i]
        parent[first[i]], parent[second[i]] = a, b
        if a == b:
            continue
        if w <= min(threshold[a], threshold[b]):
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]
            threshold[a] = w + k / float32(size[a])
        else:
            a_left[n], b_left[n] = a, b
            n += 1
    m = 0
    for i in range(n):  # sizes only grow: what is large enough now stays out
        a, b = _root(parent, a_left[i]), _root(parent, b_left[i])
        a_left[m], b_left[m] = a, b
        m += (a != b) & (min(size[a], size[b]) < MIN_SIZE_PX)
    for i in range(m):
        a, b = _root(parent, a_left[i]), _root(parent, b_left[i])
        if a != b and min(size[a], size[b]) < MIN_SIZE_PX:
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]
    number, label = np.full(num_cores, _NONE), np.empty(num_cores, np.uint32)
    count = 0
    for i in range(num_cores):
        root = _root(parent, i)
        if number[root] == _NONE:
            number[root] = count
            count += 1
        label[i] = number[root]
    return label, count


@nb.njit(cache=True, nogil=True)
def _intersect(one: Array, two: Array, three: Array, num_one: int) -> tuple[Array, tuple[Array, Array, Array]]:
    """Number the distinct triples of labels: atom of each core [C], and the three labels of each atom."""
    num_cores = len(one)
    head, following = np.full(num_one, _NONE), np.empty(num_cores, np.uint32)  # the atoms of a region of `one`, as a list
    atom_of_core = np.empty(num_cores, np.uint32)
    labels = np.empty((3, num_cores), np.uint32)
    n = uint32(0)
    for i in range(num_cores):
        atom = head[one[i]]
        while atom != _NONE and (labels[1, atom] != two[i] or labels[2, atom] != three[i]):
            atom = following[atom]
        if atom == _NONE:
            atom = n
            following[atom] = head[one[i]]
            head[one[i]] = atom
            labels[0, atom], labels[1, atom], labels[2, atom] = one[i], two[i], three[i]
            n += uint32(1)
        atom_of_core[i] = atom
    return atom_of_core, (labels[0, :n], labels[1, :n], labels[2, :n])
