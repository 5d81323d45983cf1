"""Hierarchical grouping of regions (Uijlings et al., IJCV 2013, section 3.1 and 3.2), in OpenCV's arithmetic.

The two most similar neighbors merge until none are left; every region met on the way is a proposal. Sums run in float32 in the order of the
bins and in the order color, fill, texture, size: the last bit decides between close pairs. Of equally similar pairs, OpenCV merges the last
one of its list, which the unstable std::sort orders before each merge. Where there are any, that list is kept as well.
"""

import cv2
import numba as nb
import numpy as np
from numba import float32, int32, uint32, uint64

from orl_fast.selective_search.descriptors import COLOR_BINS, TEXTURE_BINS, Atoms
from orl_fast.selective_search.scratch import Array

_COLOR, _TEXTURE = 3 * COLOR_BINS, 3 * 4 * 2 * TEXTURE_BINS
_PARTS = _TEXTURE // (2 * TEXTURE_BINS)
_NONE = np.uint32(0xFFFFFFFF)
_QUARTER, _THIRD = np.float32(0.25), np.float32(0.3333)
_BLOCK = 256  # similarities whose maximum is kept, so that the search for the largest stays short


def propose_regions(atoms: Atoms, region_of_atom: Array, area: int) -> tuple[Array, Array]:
    """All proposals of one segmentation under both strategies: boxes [P, 4] int32 xyxy and levels [P] int32, leaves first."""
    regions = _sum_atoms(atoms, region_of_atom, int(region_of_atom.max()) + 1)
    found = []
    for with_color in (True, False):
        boxes, levels = _group(*regions, area, with_color)
        found.append((boxes, levels) if len(boxes) else _group_as_listed(*regions, area, with_color))
    both_boxes, both_levels = zip(*found, strict=True)
    return np.concatenate(both_boxes), np.concatenate(both_levels)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _sum_atoms(atoms: Atoms, region_of_atom: Array, num_regions: int) -> tuple[Array, Array, Array, Array]:
    """Histograms [R, 75 + 240] float32, sizes [R], boxes [R, 4] and adjacent pairs [E] of the regions of one segmentation."""
    totals = np.zeros((num_regions, atoms.counts.shape[1]), np.int32)
    sizes = np.zeros(num_regions, np.int32)
    boxes = np.empty((num_regions, 4), np.int32)
    boxes[:, :2], boxes[:, 2:] = 2**31 - 1, 0
    for atom in range(len(region_of_atom)):
        region = region_of_atom[atom]
        total, count = totals[region], atoms.counts[atom]
        for i in range(len(count)):
            total[i] += count[i]
        sizes[region] += atoms.sizes[atom]
        box, part = boxes[region], atoms.boxes[atom]
        box[0], box[1], box[2], box[3] = min(box[0], part[0]), min(box[1], part[1]), max(box[2], part[2]), max(box[3], part[3])
    histograms = np.empty((num_regions, _COLOR + _TEXTURE), np.float32)
    texture = np.empty(_TEXTURE, np.int32)
    for region in range(num_regions):
        histogram, total = histograms[region], totals[region]
        weight = float32(0)
        for i in range(_COLOR):
            weight += float32(total[i])
        for i in range(_COLOR):
            histogram[i] = float32(total[i]) / weight
        texture[:] = 0
        for part in range(_PARTS):  # a pixel in the positive part counts as 0 in the negative part, and the other way round
            signed, unfolded = total[_COLOR + 20 * part :], texture[20 * part : 20 * part + 20]
            for i in range(TEXTURE_BINS):
                positive, negative = signed[i], signed[TEXTURE_BINS + i]
                unfolded[i] += positive
                unfolded[0] += negative
                unfolded[TEXTURE_BINS + i] += negative
                unfolded[TEXTURE_BINS + atoms.zero_bins[part]] += positive
        weight = float32(2 * _PARTS * sizes[region])
        for i in range(_TEXTURE):
            histogram[_COLOR + i] = float32(texture[i]) / weight
    pairs, n = np.empty_like(atoms.pairs), 0
    for pair in atoms.pairs:
        one, other = region_of_atom[pair >> uint64(32)], region_of_atom[pair & uint64(0xFFFFFFFF)]
        if one != other:
            pairs[n] = (uint64(min(one, other)) << uint64(32)) | uint64(max(one, other))
            n += 1
    return histograms, sizes, boxes, np.unique(pairs[:n])


@nb.njit(cache=True, nogil=True)
def _intersect(edges, ends, histograms, start, stop):  # type: ignore[no-untyped-def]
    """Intersections of four pairs of histograms: sums in order, but four at once, as each addition waits for the one before it."""
    a0, b0 = histograms[ends[2 * edges[0]], start:stop], histograms[ends[2 * edges[0] + 1], start:stop]
    a1, b1 = histograms[ends[2 * edges[1]], start:stop], histograms[ends[2 * edges[1] + 1], start:stop]
    a2, b2 = histograms[ends[2 * edges[2]], start:stop], histograms[ends[2 * edges[2] + 1], start:stop]
    a3, b3 = histograms[ends[2 * edges[3]], start:stop], histograms[ends[2 * edges[3] + 1], start:stop]
    sum0 = sum1 = sum2 = sum3 = float32(0)
    for i in range(stop - start):
        sum0 += a0[i] if a0[i] < b0[i] else b0[i]
        sum1 += a1[i] if a1[i] < b1[i] else b1[i]
        sum2 += a2[i] if a2[i] < b2[i] else b2[i]
        sum3 += a3[i] if a3[i] < b3[i] else b3[i]
    return sum0, sum1, sum2, sum3


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _compare(
    todo: Array, n: int, ends: Array, histograms: Array, sizes: Array, boxes: Array, area: int, with_color: bool, similarities: Array
) -> None:
    """Equation 6 for the first n edges of todo (which has room for 3 more): texture, size and fill, with color or without, averaged."""
    todo[n : n + 3] = todo[max(n - 1, 0)]
    for start in range(0, n, 4):
        edges = todo[start : start + 4]
        textures = _intersect(edges, ends, histograms, _COLOR, _COLOR + _TEXTURE)
        colors = _intersect(edges, ends, histograms, 0, _COLOR) if with_color else textures
        for edge, texture, color in zip(edges, textures, colors):  # noqa: B905 (numba knows no strict)
            a, b = ends[2 * edge], ends[2 * edge + 1]
            one, other, pixels = boxes[a], boxes[b], sizes[a] + sizes[b]
            hull = (max(one[2], other[2]) - min(one[0], other[0])) * (max(one[3], other[3]) - min(one[1], other[1]))
            size = max(float32(1) - float32(pixels) / float32(area), float32(0))
            fill = max(min(float32(1) - float32(hull - pixels) / float32(area), float32(1)), float32(0))
            if with_color:
                similarities[edge] = _QUARTER * color + _QUARTER * fill + _QUARTER * texture + _QUARTER * size
            else:
                similarities[edge] = (_THIRD * fill + _THIRD * texture + _THIRD * size) / (_THIRD + _THIRD + _THIRD)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _merge(a: int, b: int, into: int, histograms: Array, sizes: Array, boxes: Array) -> None:
    """Histograms merge weighted by size (section 3.2)."""
    weight_a, weight_b, weight = float32(sizes[a]), float32(sizes[b]), float32(sizes[a] + sizes[b])
    one, other, merged = histograms[a], histograms[b], histograms[into]
    for i in range(len(merged)):
        merged[i] = (one[i] * weight_a + other[i] * weight_b) / weight
    x0, y0 = min(boxes[a, 0], boxes[b, 0]), min(boxes[a, 1], boxes[b, 1])
    x1, y1 = max(boxes[a, 2], boxes[b, 2]), max(boxes[a, 3], boxes[b, 3])
    boxes[into, 0], boxes[into, 1], boxes[into, 2], boxes[into, 3] = x0, y0, x1, y1
    sizes[into] = sizes[a] + sizes[b]


@nb.njit(cache=True, nogil=True)
def _refresh_peak(peaks: Array, bits: Array, block: int) -> None:
    peak = int32(-1)
    for value in bits[block * _BLOCK : (block + 1) * _BLOCK]:
        peak = max(peak, value)
    peaks[block] = peak


@nb.njit(cache=True, nogil=True)
def _most_similar(peaks, bits):  # type: ignore[no-untyped-def]
    """The edge with the largest similarity, and another of the same if there is one; -1 if none. Floats >= 0 order like their bits."""
    first = np.argmax(peaks)
    peak, found = peaks[first], -1
    if peak >= 0:
        for block in range(first, len(peaks)):
            if peaks[block] == peak:
                for edge in range(block * _BLOCK, (block + 1) * _BLOCK):
                    if bits[edge] == peak:
                        if found >= 0:
                            return found, edge
                        found = edge
    return found, -1


@nb.njit(cache=True, nogil=True)
def _are_apart(edge, other_edge, ends, following, head):  # type: ignore[no-untyped-def]
    """Whether no region of one edge is the same as or next to one of the other."""
    for region in ends[2 * edge : 2 * edge + 2]:
        half = head[region]
        while half != _NONE:
            neighbor = ends[half ^ uint32(1)]
            if neighbor == ends[2 * other_edge] or neighbor == ends[2 * other_edge + 1]:
                return False
            half = following[half]
    return True


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _group(histograms: Array, sizes: Array, boxes: Array, pairs: Array, area: int, with_color: bool) -> tuple[Array, Array]:
    """Merge until no neighbors are left (algorithm 1): boxes [2 R - 1, 4] and levels, leaves first, then merges in order.

    Edges lie in fixed slots; half-edge 2 e belongs to one end of edge e, 2 e + 1 to the other; each region has a list of its half-edges,
    those of dead edges included.

    Of two equally similar edges, either may go first if they are apart and no edge of the regions they make is as similar: so if one
    follows directly on the other and what is left is less similar. Otherwise, nothing is returned.
    """
    num_regions, num_edges = len(sizes), len(pairs)
    histograms, sizes, boxes = histograms.copy(), sizes.copy(), boxes.copy()
    levels = np.ones(num_regions, np.int32)
    all_boxes, all_levels = np.empty((2 * num_regions, 4), np.int32), np.ones(2 * num_regions, np.int32)
    all_boxes[:num_regions] = boxes
    n = num_regions
    num_blocks = max(1, (num_edges + _BLOCK - 1) // _BLOCK)
    ends, following = np.empty(2 * num_edges, np.uint32), np.empty(2 * num_edges, np.uint32)
    head, seen = np.full(num_regions, _NONE), np.full(num_regions, -1)
    similarities = np.empty(num_blocks * _BLOCK, np.float32)
    bits, peaks = similarities.view(np.int32), np.empty(num_blocks, np.int32)
    bits[:] = -1  # dead
    for edge in range(num_edges):
        ends[2 * edge], ends[2 * edge + 1] = uint32(pairs[edge] >> uint64(32)), uint32(pairs[edge] & uint64(0xFFFFFFFF))
        for half in (2 * edge, 2 * edge + 1):
            following[half] = head[ends[half]]
            head[ends[half]] = half
    todo = np.arange(num_edges + 3).astype(np.uint32)
    _compare(todo, num_edges, ends, histograms, sizes, boxes, area, with_color, similarities)
    for block in range(num_blocks):
        _refresh_peak(peaks, bits, block)
    best, equal = _most_similar(peaks, bits)
    limit, awaited = int32(-1), -1  # of two equally similar edges: their similarity, and the second
    while best >= 0:
        if awaited >= 0:
            if best != awaited or equal >= 0:
                break
            awaited = -1
        elif 0 <= limit <= bits[best] or (equal >= 0 and not _are_apart(best, equal, ends, following, head)):
            break
        else:
            limit, awaited = (bits[best] if equal >= 0 else int32(-1)), equal
        a, b = ends[2 * best], ends[2 * best + 1]
        merged = min(a, b)
        _merge(a, b, merged, histograms, sizes, boxes)
        levels[merged] = max(levels[a], levels[b]) + 1
        all_boxes[n], all_levels[n] = boxes[merged], levels[merged]
        n += 1
        lists = (head[a], head[b])
        head[merged] = _NONE
        num_todo = 0
        for half in lists:
            while half != _NONE:
                other, edge, next_half = ends[half ^ uint32(1)], half >> uint32(1), following[half]
                if edge == best or seen[other] == n:  # the merged edge itself, or a neighbor of both
                    bits[edge] = -1
                    _refresh_peak(peaks, bits, edge // uint32(_BLOCK))
                elif bits[edge] >= 0:
                    seen[other] = n
                    ends[half], following[half], head[merged] = merged, head[merged], half
                    todo[num_todo] = edge
                    num_todo += 1
                half = next_half
        _compare(todo, num_todo, ends, histograms, sizes, boxes, area, with_color, similarities)
        for edge in todo[:num_todo]:
            _refresh_peak(peaks, bits, edge // uint32(_BLOCK))
        best, equal = _most_similar(peaks, bits)
    n *= best < 0
    return all_boxes[:n], all_levels[:n]


def _group_as_listed(histograms: Array, sizes: Array, boxes: Array, pairs: Array, area: int, with_color: bool) -> tuple[Array, Array]:
    """`_group` with OpenCV's list of edges: each merge takes the last one after sorting and puts those of the merged region at the end."""
    histograms, sizes, boxes = histograms.copy(), sizes.copy(), boxes.copy()
    all_boxes, all_levels, levels = [boxes.copy()], [1] * len(sizes), [1] * len(sizes)
    ends = np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)
    similarities, num_new = np.empty(len(ends), np.float32), len(ends)
    while len(ends):
        todo = np.arange(len(ends) - num_new, len(ends) + 3, dtype=np.uint32)
        _compare(todo, num_new, ends.reshape(-1), histograms, sizes, boxes, area, with_color, similarities)
        order = cv2.sortIdx(similarities[None], cv2.SORT_EVERY_ROW)[0]
        a, b = ends[order[-1]].tolist()
        ends, similarities = ends[order[:-1]], similarities[order[:-1]]
        merged = min(a, b)
        _merge(a, b, merged, histograms, sizes, boxes)
        levels[merged] = max(levels[a], levels[b]) + 1
        all_boxes.append(boxes[merged : merged + 1].copy())
        all_levels.append(levels[merged])
        of_either = (ends == a) | (ends == b)
        stays, neighbors = ~of_either.any(1), np.where(of_either[:, 0], ends[:, 1], ends[:, 0])
        new = [(merged, neighbor) for neighbor in dict.fromkeys(neighbors[~stays].tolist())]
        num_new = len(new)
        ends = np.concatenate([ends[stays], np.array(new, np.uint32).reshape(-1, 2)])
        similarities = np.concatenate([similarities[stays], np.empty(num_new, np.float32)])
    return np.concatenate(all_boxes), np.array(all_levels, np.int32)
