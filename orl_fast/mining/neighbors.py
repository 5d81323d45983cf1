"""The K nearest other images of each image, by cosine of their features (paper, section 3.2, stage 2 i), found with faiss.

Up to a few million images the search is exact. faiss proposes a few more candidates than are needed; they are ranked by inner products
computed here in one fixed order, and equal ones by their row, so that the result depends on neither blocks nor threads nor the device.
The query is left out by its row; the reference drops whatever is ranked first, which is wrong where an image has a duplicate.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import faiss
import numba as nb
import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.mining.parts import pieces
from orl_fast.tables import NeighborTable

EXACT_LIMIT = 4_000_000  # images; beyond, an exact search of all by all takes longer than the rest of the stage
_QUERY_BLOCK = 8192
_BASE_BLOCK = 1 << 20
_SPARE = 16  # candidates beyond K + 1
_SURE = 4.0  # a candidate left out may score higher than faiss said by this many times the largest error seen
_RECALL_SAMPLE = 1000
_UNSURE_BLOCK, _UNSURE_BASE = 256, 1 << 16

Features = NDArray[np.float32]
Rows = NDArray[np.int64]
Search = Callable[[Features, int], tuple[Features, Rows]]  # queries, count → scores and rows, [B, count] each


def find_neighbors(
    features: Features, *, num_neighbors: int, exact_limit: int = EXACT_LIMIT, use_gpu: bool = False, num_threads: int = 1
) -> Iterator[NeighborTable]:
    """The `num_neighbors` rows nearest to each row by inner product, the row itself left out; of equal ones the lower row first.

    Memory is bounded by the blocks in work, whatever the number of rows; `features` may be a memory map. Above `exact_limit` rows an
    inverted file (IVF) proposes the candidates, and its recall against the exact search is measured on a sample and told in the log.

    Args:
        features: [N, D] float32, of unit length.
    Yields:
        The neighbors of some consecutive images, in order.
    Raises:
        DataError: there are not more than `num_neighbors` rows.
    """
    if len(features) <= num_neighbors:
        raise DataError(
            f"{num_neighbors} neighbors are asked for, but there are only {len(features)} images; "
            f"pack more images, or use --neighbors {max(1, len(features) - 1)}"
        )
    faiss.omp_set_num_threads(num_threads)
    ranked = partial(_ranked, features, num_neighbors=num_neighbors, num_threads=num_threads)
    find = partial(ranked, search=_exact_search(features, use_gpu=use_gpu), exact=True)
    if len(features) > exact_limit:
        find_exactly, find = find, partial(ranked, search=_ivf_search(features, use_gpu=use_gpu), exact=False)
        sample = np.sort(np.random.default_rng(1).choice(len(features), min(len(features), _RECALL_SAMPLE), replace=False))
        both = zip(find_exactly(sample).neighbors, find(sample).neighbors, strict=True)
        recall = 100 * np.mean([np.isin(true, found).mean() for true, found in both])
        log.info("neighbors: IVF index; it finds %.2f %% of the exact %d neighbors of a sample", recall, num_neighbors)
    for rows in pieces(range(len(features)), _QUERY_BLOCK):
        yield find(np.asarray(rows))


def _ranked(features: Features, rows: Rows, search: Search, *, num_neighbors: int, exact: bool, num_threads: int) -> NeighborTable:
    """Rank candidates by products computed in a fixed order. Where a row left out might belong among them, compare with all rows."""
    num_candidates = min(num_neighbors + 1 + _SPARE, len(features))
    queries = np.ascontiguousarray(features[rows])
    scores, candidates = search(queries, num_candidates)
    products = _products(queries, features, candidates, num_threads=num_threads)
    found = candidates >= 0  # an inverted file may find fewer than asked for
    error = _SURE * float(np.abs(products - scores)[found].max(initial=0)) + float(np.finfo(np.float32).eps)
    block = _best(candidates, np.where(found, products, -np.inf), rows, num_neighbors)
    worst = block.similarities[:, -1]
    unsure = worst == -np.inf
    if exact and num_candidates < len(features):
        unsure |= scores[:, -1] + error >= worst
    places = np.flatnonzero(unsure)
    if not len(places):
        return block
    log.debug("neighbors: %d of %d images have more near ties than candidates; they are compared with all", len(places), len(rows))
    for group in np.split(places, range(_UNSURE_BLOCK, len(places), _UNSURE_BLOCK)):
        for i, close in zip(group, _close_rows(features, queries[group], worst[group] - error), strict=True):
            products = _products(queries[i : i + 1], features, close[None], num_threads=1)
            best = _best(close[None], products, rows[i : i + 1], num_neighbors)
            block.neighbors[i], block.similarities[i] = best.neighbors[0], best.similarities[0]
    return block


def _best(candidates: Rows, products: NDArray[np.float64], rows: Rows, num_neighbors: int) -> NeighborTable:
    products = np.where(candidates == rows[:, None], -np.inf, products)
    order = np.lexsort((candidates, -products), axis=1)[:, :num_neighbors]
    return NeighborTable(
        neighbors=np.take_along_axis(candidates, order, axis=1),
        similarities=np.take_along_axis(products, order, axis=1).astype(np.float32),
    )


def _exact_search(features: Features, *, use_gpu: bool) -> Search:
    knn = partial(faiss.knn_gpu, faiss.StandardGpuResources()) if use_gpu else faiss.knn

    def search(queries: Features, count: int) -> tuple[Features, Rows]:
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start in range(0, len(features), _BASE_BLOCK):
            base = np.ascontiguousarray(features[start : start + _BASE_BLOCK])
            size = min(count, len(base))
            new_scores, new_rows = knn(queries, base, size, metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = np.concatenate([scores, new_scores], axis=1), np.concatenate([rows, new_rows + start], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        return scores, rows

    return search


def _ivf_search(features: Features, *, use_gpu: bool) -> Search:
    """An inverted file of half-precision vectors: 2 D bytes of memory per image."""
    num, dim = features.shape
    num_lists = max(1, int(4 * num**0.5))
    flat, kind = faiss.IndexFlatIP(dim), faiss.ScalarQuantizer.QT_fp16
    index: Any = faiss.IndexIVFScalarQuantizer(flat, dim, num_lists, kind, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(num, min(num, 40 * num_lists), replace=False)
    index.nprobe = max(8, num_lists // 64)
    if use_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.train(np.ascontiguousarray(features[np.sort(sample)]))
    for start in range(0, num, _BASE_BLOCK):
        index.add(np.ascontiguousarray(features[start : start + _BASE_BLOCK]))
    search: Search = index.search
    return search


def _close_rows(features: Features, queries: Features, thresholds: NDArray[np.float32]) -> list[Rows]:
    """For each query, all rows whose product with it reaches its threshold."""
    close: list[list[Rows]] = [[] for _ in queries]
    for start in range(0, len(features), _UNSURE_BASE):
        is_close = queries @ features[start : start + _UNSURE_BASE].T >= thresholds[:, None]  # [B, block]
        for found, row in zip(close, is_close, strict=True):
            found.append(np.flatnonzero(row) + start)
    return [np.concatenate(parts) for parts in close]


def _products(queries: Features, features: Features, candidates: Rows, *, num_threads: int) -> NDArray[np.float64]:
    """[B, M] float64 inner products of query b with rows candidates[b]; 0 where a candidate is -1."""
    out = np.zeros(candidates.shape, np.float64)
    edges = np.linspace(0, len(queries), num_threads + 1).astype(np.int64)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda part: _products_kernel(queries, features, candidates, part[0], part[1], out), pairwise(edges)))
    return out


@nb.njit(cache=True, nogil=True)
def _products_kernel(queries, features, candidates, start, stop, out):  # type: ignore[no-untyped-def]
    """Sums in eight lanes, always in the same order: equal vectors have equal products, whatever the block or the machine."""
    dim = queries.shape[1]
    lanes = np.empty(8, np.float64)
    for b in range(start, stop):
        query = queries[b]
        for m in range(candidates.shape[1]):
            if candidates[b, m] < 0:
                continue
            row = features[candidates[b, m]]
            lanes[:] = 0.0
            for d in range(0, dim - 7, 8):
                for lane in range(8):
                    lanes[lane] += np.float64(query[d + lane]) * np.float64(row[d + lane])
            total = 0.0
            for lane in range(8):
                total += lanes[lane]
            for d in range(dim - dim % 8, dim):
                total += np.float64(query[d]) * np.float64(row[d])
            out[b, m] = total
