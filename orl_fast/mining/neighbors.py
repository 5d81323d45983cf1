"""The K nearest other images of each image, by cosine of their features (paper, section 3.2, stage 2 i), found with faiss.

Up to a few million images the search is exact. faiss proposes a few more candidates than are needed; they are ranked by inner products
computed here in one fixed order, and equal ones by their row, so that the result depends on neither blocks nor threads nor the device.
The query is left out by its row; the reference drops whatever is ranked first, which is wrong where an image has a duplicate.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numba as nb
import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log
from orl_fast.errors import DataError

EXACT_LIMIT = 4_000_000  # images; beyond, an exact search of all by all takes longer than the rest of the stage
_QUERY_BLOCK = 8192
_BASE_BLOCK = 1 << 20
_SPARE = 16  # candidates beyond K + 1
_SURE = 4.0  # a candidate left out may score higher than faiss said by this many times the largest error seen
_RECALL_SAMPLE = 1000

_UNSURE_BLOCK, _UNSURE_BASE = 256, 1 << 16

Features = NDArray[np.float32]
Rows = NDArray[np.int64]
Search = Callable[[Features, Features, int], tuple[Features, Rows]]  # queries, base, count → scores and rows, [B, count] each


@dataclass(frozen=True, kw_only=True)
class Block:
    """The neighbors of some consecutive images: neighbors [B, K] int64, similarities [B, K] float32, best first."""

    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]


def find_neighbors(
    features: Features, *, num_neighbors: int, exact_limit: int = EXACT_LIMIT, use_gpu: bool = False, num_threads: int = 1
) -> Iterator[Block]:
    """The `num_neighbors` rows nearest to each row by inner product, the row itself left out; of equal ones the lower row first.

    Memory is bounded by the blocks in work, whatever the number of rows; `features` may be a memory map. Above `exact_limit` rows an
    inverted file (IVF) proposes the candidates, and its recall against the exact search is measured on a sample and told in the log.

    Args:
        features: [N, D] float32, of unit length.
    Yields:
        Blocks of rows, in order.
    Raises:
        DataError: there are not more than `num_neighbors` rows.
    """
    if len(features) <= num_neighbors:
        raise DataError(
            f"{num_neighbors} neighbors are asked for, but there are only {len(features)} images; "
            f"pack more images, or use --neighbors {max(1, len(features) - 1)}"
        )
    faiss.omp_set_num_threads(num_threads)
    exact = len(features) <= exact_limit
    search = _exact_search(use_gpu=use_gpu)
    if not exact:
        approximate = _ivf_search(features, use_gpu=use_gpu)
        recall = _recall(features, approximate, search, num_neighbors=num_neighbors, num_threads=num_threads)
        log.info("neighbors: IVF index; it finds %.2f %% of the exact %d neighbors of a sample", 100 * recall, num_neighbors)
        search = approximate
    for start in range(0, len(features), _QUERY_BLOCK):
        rows = np.arange(start, min(start + _QUERY_BLOCK, len(features)))
        yield _ranked(features, rows, search, num_neighbors=num_neighbors, exact=exact, num_threads=num_threads)


def _ranked(features: Features, rows: Rows, search: Search, *, num_neighbors: int, exact: bool, num_threads: int) -> Block:
    """Rank candidates by products computed in a fixed order. Where a row left out might belong among them, compare with all rows."""
    num_candidates = min(num_neighbors + 1 + _SPARE, len(features))
    queries = np.ascontiguousarray(features[rows])
    scores, candidates = search(queries, features, num_candidates)
    products = _products(queries, features, candidates, num_threads=num_threads)
    found = candidates >= 0  # an inverted file may find fewer than asked for
    error = _SURE * float(np.abs(products - scores)[found].max(initial=0)) + float(np.finfo(np.float32).eps)
    block = _best(candidates, np.where(found, products, -np.inf), rows, num_neighbors)
    worst = block.similarities[:, -1]
    unsure = worst == -np.inf
    if exact and num_candidates < len(features):
        unsure |= scores[:, -1] + error >= worst
    num_unsure = int(unsure.sum())
    if num_unsure:
        log.debug("neighbors: %d of %d images have more near ties than candidates; they are compared with all", num_unsure, len(rows))
    for group in _groups(np.flatnonzero(unsure)):
        for i, close in zip(group, _close_rows(features, queries[group], worst[group] - error), strict=True):
            products = _products(queries[i : i + 1], features, close[None], num_threads=1)
            best = _best(close[None], products, rows[i : i + 1], num_neighbors)
            block.neighbors[i], block.similarities[i] = best.neighbors[0], best.similarities[0]
    return block


def _best(candidates: Rows, products: NDArray[np.float64], rows: Rows, num_neighbors: int) -> Block:
    products = np.where(candidates == rows[:, None], -np.inf, products)
    order = np.lexsort((candidates, -products), axis=1)[:, :num_neighbors]
    return Block(
        neighbors=np.take_along_axis(candidates, order, axis=1),
        similarities=np.take_along_axis(products, order, axis=1).astype(np.float32),
    )


def _exact_search(*, use_gpu: bool) -> Search:
    resources = faiss.StandardGpuResources() if use_gpu else None

    def search(queries: Features, features: Features, count: int) -> tuple[Features, Rows]:
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start in range(0, len(features), _BASE_BLOCK):
            base = np.ascontiguousarray(features[start : start + _BASE_BLOCK])
            size = min(count, len(base))
            if resources is None:
                new_scores, new_rows = faiss.knn(queries, base, size, metric=faiss.METRIC_INNER_PRODUCT)
            else:
                new_scores, new_rows = faiss.knn_gpu(resources, queries, base, size, metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = np.concatenate([scores, new_scores], axis=1), np.concatenate([rows, new_rows + start], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        return scores, rows

    return search


def _ivf_search(features: Features, *, use_gpu: bool) -> Search:
    """An inverted file of half-precision vectors: 2 D bytes of memory per image."""
    num, dim = features.shape
    num_lists = max(1, int(4 * num**0.5))
    index: Any = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, num_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    sample = np.random.default_rng(0).choice(num, min(num, 40 * num_lists), replace=False)
    index.nprobe = max(8, num_lists // 64)
    if use_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.train(np.ascontiguousarray(features[np.sort(sample)]))
    for start in range(0, num, _BASE_BLOCK):
        index.add(np.ascontiguousarray(features[start : start + _BASE_BLOCK]))

    def search(queries: Features, features: Features, count: int) -> tuple[Features, Rows]:
        del features
        scores, rows = index.search(queries, count)
        return scores, rows

    return search


def _recall(features: Features, approximate: Search, exact: Search, *, num_neighbors: int, num_threads: int) -> float:
    """The share of exact neighbors that an approximate search finds, over a sample of queries."""
    rows = np.sort(np.random.default_rng(1).choice(len(features), min(len(features), _RECALL_SAMPLE), replace=False))
    found = _ranked(features, rows, approximate, num_neighbors=num_neighbors, exact=False, num_threads=num_threads).neighbors
    true = _ranked(features, rows, exact, num_neighbors=num_neighbors, exact=True, num_threads=num_threads).neighbors
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(true, found, strict=True)]))


def _groups(rows: Rows) -> list[Rows]:
    return [rows[start : start + _UNSURE_BLOCK] for start in range(0, len(rows), _UNSURE_BLOCK)]


def _close_rows(features: Features, queries: Features, thresholds: NDArray[np.float32]) -> list[Rows]:
    """For each query, all rows whose product with it reaches its threshold."""
    close: list[list[Rows]] = [[] for _ in queries]
    for start in range(0, len(features), _UNSURE_BASE):
        scores = queries @ features[start : start + _UNSURE_BASE].T  # [B, block]
        for i in range(len(queries)):
            close[i].append(np.flatnonzero(scores[i] >= thresholds[i]) + start)
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
