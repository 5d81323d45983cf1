"""Graph-based segmentation at three scales at once (Felzenszwalb & Huttenlocher, IJCV 2004), as OpenCV computes it.

Edges of the 4-connected pixel graph in ascending order; components A and B join over an edge of weight w if w <= w_last(A) + k / |A|
and likewise for B. What the three scales k decide alike is decided once: a *core* grows as long as every k accepts its edges. The first
edge on which they differ freezes both cores, and the edges that are left, between cores, are replayed for each k. This is exact: up to
that edge a frozen core is the same component in all three runs, every later edge that touches it is replayed, and of several edges
between the same two cores only the first can decide anything (accepted, it makes the others inner edges; rejected, one side is final).

The order of equal weights cannot change what the criterion joins, but it can decide which neighbor a region below the minimum size joins
afterwards. OpenCV's order is what the unstable std::sort leaves. Where it matters (in flat, drawn and posterized images), the edges are
sorted once more by cv2.sortIdx, which is the same std::sort.
"""

import cv2
import numba as nb
import numpy as np
from numba import float32, uint32, uint64

from orl_fast.selective_search.scratch import Array, Scratch

SCALES = (150.0, 300.0, 450.0)
MIN_SIZE_PX = 100
_SIGMA_PX = float(np.float32(0.8))  # OpenCV passes it as float32; the kernel's last digits decide edges
_LOW_K, _HIGH_K = np.float32(SCALES[0]), np.float32(SCALES[-1])
_NONE = np.uint32(0xFFFFFFFF)
_BLOCK = 512  # edges whose components are looked up together, so that the look-ups overlap
RECENT = 8192  # direct-mapped memory of recent pairs


def segment(image: Array, scratch: Scratch) -> tuple[Array, Array]:
    """Segment an image [H, W, 3] uint8 with k = 150, 300, 450, sigma 0.8 and regions of at least 100 pixels.

    Returns:
        atoms: [H, W] uint32, the common refinement of the three segmentations; in the scratch buffers.
        regions: [3, A] uint32, for each k the region that holds an atom; ids in raster order.
    """
    height, width = image.shape[:2]
    num_pixels, num_edges = height * width, height * (width - 1) + (height - 1) * width
    image_f32 = scratch.take("image", image.shape, np.float32)
    np.copyto(image_f32, image)
    blurred = cv2.GaussianBlur(image_f32, (0, 0), _SIGMA_PX, dst=scratch.take("blurred", image.shape, np.float32))
    edges, ordered = scratch.take("edges", (num_edges,), np.uint64), scratch.take("ordered", (num_edges,), np.uint64)
    _weigh_edges(blurred, edges)
    _sort_edges(edges, ordered)
    parent, state = scratch.take("parent", (num_pixels,), np.uint32), scratch.take("state", (num_pixels, 2), np.float32)
    pairs, weights = edges, scratch.take("weights", (num_edges,), np.float32)
    num_pairs = _grow_cores(ordered, width, parent, state, pairs, weights)
    core_of_pixel = scratch.take("cores", (num_pixels,), np.uint32)
    sizes, last, num_pairs = _number_cores(parent, state, pairs[:num_pairs], weights[:num_pairs], core_of_pixel)
    edges_left = pairs[:num_pairs], weights[:num_pairs], False
    labels = np.empty((len(SCALES), len(sizes)), np.uint32)
    for k, label in zip(SCALES, labels, strict=True):
        if not _segment_cores(sizes, last, *edges_left, np.float32(k), label):
            edges_left = *_pairs_in_order(blurred, core_of_pixel.reshape(height, width)), True
            _segment_cores(sizes, last, *edges_left, np.float32(k), label)
    atom_of_core, regions = _intersect(labels)
    atoms = scratch.take("atoms", (num_pixels,), np.uint32)
    np.take(atom_of_core, core_of_pixel, out=atoms, mode="clip")
    return atoms.reshape(height, width), regions


@nb.njit(cache=True, nogil=True)
def _weigh_edges(blurred: Array, edges: Array) -> None:
    """[E] uint64: the weight's float32 bits in the upper half, 2 * pixel + (0 to the right, 1 down) in the lower."""
    height, width, _ = blurred.shape
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
                    difference = other[x, c] - row[x, c]
                    total += difference * difference
                weight[x] = np.sqrt(total)
            out = edges[n : n + count]
            for x in range(count):
                out[x] = (uint64(bits[x]) << uint64(32)) | uint64(2 * (y * width + x) + down)
            n += count


@nb.njit(cache=True, nogil=True, inline="always")
def _radix_pass(source, target, shift, position):  # type: ignore[no-untyped-def]
    """Stable sort by len(position) (a power of two) values of the bits above shift; position becomes where each bucket stops."""
    shift, mask = uint64(shift), uint64(len(position) - 1)
    position[:] = 0
    for edge in source:
        position[(edge >> shift) & mask] += uint32(1)
    start = uint32(0)
    for i in range(len(position)):
        start, position[i] = start + position[i], start
    for edge in source:
        bucket = (edge >> shift) & mask
        target[position[bucket]] = edge
        position[bucket] += uint32(1)


@nb.njit(cache=True, nogil=True)
def _sort_edges(edges: Array, ordered: Array) -> None:
    """Stable sort by weight (floats >= 0 sort like their bits): buckets by the upper 14 bits, each small enough to be sorted in cache."""
    position, low, high = np.empty(1 << 14, np.uint32), np.empty(512, np.uint32), np.empty(256, np.uint32)
    _radix_pass(edges, ordered, 49, position)
    start = uint32(0)
    for stop in position:
        if stop > start + 1:
            _radix_pass(ordered[start:stop], edges[start:stop], 32, low)
            _radix_pass(edges[start:stop], ordered[start:stop], 41, high)
        start = stop


@nb.njit(cache=True, nogil=True, inline="always")
def remember_pair(pairs, n, recent, one, other):  # type: ignore[no-untyped-def]
    """Append smaller << 32 | larger unless it was seen lately; returns the new length. A miss only costs a duplicate."""
    pair = (uint64(min(one, other)) << uint64(32)) | uint64(max(one, other))
    slot = (pair * uint64(0x9E3779B97F4A7C15)) >> uint64(51)
    if recent[slot] == pair:
        return n
    recent[slot] = pair
    pairs[n] = pair
    return n + 1


@nb.njit(cache=True, nogil=True, inline="always")
def _root(parent, node):  # type: ignore[no-untyped-def]
    found = parent[node]
    up = parent[found]
    while up != found:
        found = up
        up = parent[found]
    return found


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _grow_cores(edges: Array, width: int, parent: Array, state: Array, pairs: Array, weights: Array) -> int:
    """Join what every k joins; returns the number M of edges left to be decided per k.

    Args:
        edges: [E], sorted.
        parent: [N] uint32, becomes the union-find forest.
        state: [N, 2] float32, becomes each root's w_last, and its size as int32 bits, negative once it is frozen.
        pairs, weights: [E], become the M edges left, in order: root << 32 | root, and weight.
    """
    size = state.view(np.int32)
    for i in range(len(parent)):
        parent[i] = i
        state[i, 0], size[i, 1] = 0, 1
    recent = np.full(RECENT, ~uint64(0))
    first, second, weight = np.empty(_BLOCK + 1, np.uint32), np.empty(_BLOCK + 1, np.uint32), np.empty(_BLOCK + 1, np.float32)
    offset = np.array([1, width], np.uint32)
    words, floats = edges.view(np.uint32), edges.view(np.float32)
    n = 0
    for start in range(0, len(edges), _BLOCK):
        block_words, block_floats = words[2 * start : 2 * (start + _BLOCK)], floats[2 * start : 2 * (start + _BLOCK)]
        live = 0
        for i in range(len(block_words) // 2):  # without a branch: most edges lie within a component by now and drop out here
            pixel = block_words[2 * i] >> uint32(1)
            neighbor = pixel + offset[block_words[2 * i] & uint32(1)]
            a, b = parent[parent[pixel]], parent[parent[neighbor]]
            parent[pixel], parent[neighbor] = a, b
            first[live], second[live], weight[live] = a, b, block_floats[2 * i + 1]
            live += a != b
        for i in range(live):
            a, b, w = _root(parent, first[i]), _root(parent, second[i]), weight[i]
            if a == b:
                continue
            last_a, last_b, size_a, size_b = state[a, 0], state[b, 0], size[a, 1], size[b, 1]
            free_a, free_b = size_a > 0, size_b > 0
            if free_a & free_b & (w <= last_a + _LOW_K / float32(size_a)) & (w <= last_b + _LOW_K / float32(size_b)):
                if size_a < size_b:
                    a, b = b, a
                parent[b] = a
                state[a, 0], size[a, 1] = w, size_a + size_b
                continue
            possible_a = (w <= last_a + _HIGH_K / float32(size_a)) if free_a else True
            possible_b = (w <= last_b + _HIGH_K / float32(size_b)) if free_b else True
            if possible_a & possible_b:  # some k accepts it: from here on both are decided per k
                size[a, 1], size[b, 1] = -abs(size_a), -abs(size_b)
            weights[n] = w
            n = remember_pair(pairs, n, recent, a, b)
    return n


@nb.njit(cache=True, nogil=True)
def _number_cores(parent: Array, state: Array, pairs: Array, weights: Array, core_of_pixel: Array) -> tuple[Array, Array, int]:
    """Number the C cores in raster order: fills core_of_pixel [N], renames the pairs and drops those within a core.

    Returns:
        sizes [C] uint32, w_last [C] float32, and how many pairs are left.
    """
    size = state.view(np.int32)
    core_of_pixel[:] = _NONE
    sizes, last = np.empty(len(parent), np.uint32), np.empty(len(parent), np.float32)
    n = uint32(0)
    for pixel in range(len(parent)):
        root = _root(parent, pixel)
        if core_of_pixel[root] == _NONE:
            core_of_pixel[root] = n
            sizes[n], last[n] = abs(size[root, 1]), state[root, 0]
            n += uint32(1)
        core_of_pixel[pixel] = core_of_pixel[root]
    m = 0
    for i in range(len(pairs)):
        a, b = core_of_pixel[pairs[i] >> uint64(32)], core_of_pixel[pairs[i] & uint64(0xFFFFFFFF)]
        pairs[m], weights[m] = (uint64(a) << uint64(32)) | uint64(b), weights[i]
        m += a != b
    return sizes[:n].copy(), last[:n].copy(), m


def _pairs_in_order(blurred: Array, core_of_pixel: Array) -> tuple[Array, Array]:
    """All pairs of adjacent pixels of two cores, as core << 32 | core, and their weights, in the order of OpenCV's sort.

    OpenCV lists the edges pixel by pixel: up, left, down and right, so each twice.
    """
    shape = (*core_of_pixel.shape, 4)
    weights, others = np.full(shape, np.nan, np.float32), np.empty(shape, np.uint32)
    for near, far, to_near, to_far in ((np.s_[:-1], np.s_[1:], 2, 0), (np.s_[:, :-1], np.s_[:, 1:], 3, 1)):
        squares = (blurred[near] - blurred[far]) ** 2
        weights[near][..., to_near] = weights[far][..., to_far] = np.sqrt(squares[..., 0] + squares[..., 1] + squares[..., 2])
        others[near][..., to_near], others[far][..., to_far] = core_of_pixel[far], core_of_pixel[near]
    exists = ~np.isnan(weights)
    weights, others = weights[exists], others[exists]
    cores = np.broadcast_to(core_of_pixel[..., None], shape)[exists]
    order = cv2.sortIdx(weights[None], cv2.SORT_EVERY_ROW)[0]
    order = order[(cores != others)[order]]
    return (cores[order].astype(np.uint64) << np.uint64(32)) | others[order], weights[order]


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _segment_cores(sizes: Array, last: Array, pairs: Array, weights: Array, in_order: bool, k: np.float32, label: Array) -> bool:
    """The segmentation for one k, as labels [C]: join cores by the criterion, then regions below the minimum size.

    False if the order of equal weights decides something and they are not in OpenCV's order.
    """
    num_cores = len(sizes)
    parent, size = np.arange(num_cores).astype(np.uint32), sizes.copy()
    threshold = np.empty(num_cores, np.float32)
    for i in range(num_cores):
        threshold[i] = last[i] + k / float32(size[i])
    left, left_weights, n = np.empty(len(pairs) + 1, np.uint64), np.empty(len(pairs) + 1, np.float32), 0
    first, second, weight = np.empty(_BLOCK + 1, np.uint32), np.empty(_BLOCK + 1, np.uint32), np.empty(_BLOCK + 1, np.float32)
    for start in range(0, len(pairs), _BLOCK):
        block_pairs, block_weights = pairs[start : start + _BLOCK], weights[start : start + _BLOCK]
        live = 0
        for i in range(len(block_pairs)):  # as in `_grow_cores`
            one, other = uint32(block_pairs[i] >> uint64(32)), uint32(block_pairs[i] & uint64(0xFFFFFFFF))
            a, b = parent[parent[one]], parent[parent[other]]
            parent[one], parent[other] = a, b
            first[live], second[live], weight[live] = a, b, block_weights[i]
            live += a != b
        for i in range(live):
            a, b, w = _root(parent, first[i]), _root(parent, second[i]), weight[i]
            if w > min(threshold[a], threshold[b]):
                left[n], left_weights[n] = (uint64(a) << uint64(32)) | uint64(b), w
                n += a != b
            elif a != b:
                if size[a] < size[b]:
                    a, b = b, a
                parent[b] = a
                size[a] += size[b]
                threshold[a] = w + k / float32(size[a])
    m = 0
    for i in range(n):  # sizes only grow: what is large enough now stays out
        a, b = _root(parent, left[i] >> uint64(32)), _root(parent, left[i] & uint64(0xFFFFFFFF))
        left[m], left_weights[m] = (uint64(a) << uint64(32)) | uint64(b), left_weights[i]
        m += (a != b) & (min(size[a], size[b]) < MIN_SIZE_PX)
    neighbor, neighbor_at = np.empty(num_cores, np.uint32), np.full(num_cores, -1)
    start = 0
    while start < m:
        stop = start + 1
        while stop < m and left_weights[stop] == left_weights[start]:
            stop += 1
        if stop - start > 1 and not in_order:  # the order matters to a small region with two neighbors to join
            for i in range(start, stop):
                a, b = _root(parent, left[i] >> uint64(32)), _root(parent, left[i] & uint64(0xFFFFFFFF))
                for one, other in ((a, b), (b, a)):
                    if a != b and size[one] < MIN_SIZE_PX:
                        if neighbor_at[one] == start and neighbor[one] != other:
                            return False
                        neighbor[one], neighbor_at[one] = other, start
        for i in range(start, stop):
            a, b = _root(parent, left[i] >> uint64(32)), _root(parent, left[i] & uint64(0xFFFFFFFF))
            if a != b and min(size[a], size[b]) < MIN_SIZE_PX:
                if size[a] < size[b]:
                    a, b = b, a
                parent[b] = a
                size[a] += size[b]
        start = stop
    number, count = np.full(num_cores, _NONE), 0
    for i in range(num_cores):
        root = _root(parent, i)
        if number[root] == _NONE:
            number[root] = count
            count += 1
        label[i] = number[root]
    return True


@nb.njit(cache=True, nogil=True)
def _intersect(labels: Array) -> tuple[Array, Array]:
    """Number the distinct triples of labels [3, C]: atom of each core [C], and the labels of each atom [3, A]."""
    num_cores = labels.shape[1]
    head, following = np.full(num_cores, _NONE), np.empty(num_cores, np.uint32)  # the atoms of a region at the first scale, as a list
    atom_of_core, regions = np.empty(num_cores, np.uint32), np.empty((3, num_cores), np.uint32)
    n = uint32(0)
    for i in range(num_cores):
        first = labels[0, i]
        atom = head[first]
        while atom != _NONE and (regions[1, atom] != labels[1, i] or regions[2, atom] != labels[2, i]):
            atom = following[atom]
        if atom == _NONE:
            atom, following[n], head[first] = n, head[first], n
            regions[:, n] = labels[:, i]
            n += uint32(1)
        atom_of_core[i] = atom
    return atom_of_core, regions[:, :n]
