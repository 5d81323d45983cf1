"""The K nearest other images of each image, by cosine of their features (paper, section 3.2, stage 2 i): faiss in float32.

The query is left out by its row; the reference drops whatever is ranked first, which is wrong where an image has a duplicate. Of equal
scores the lower row comes first. Scores are rounded as faiss computes them: last digits, and with them the order of near ties, may differ
between a CPU and a GPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.tables import NeighborTable

EXACT_LIMIT = 4_000_000  # images; beyond, comparing all with all takes longer than the rest of the stage
_QUERY_BLOCK = 8192
_BASE_BLOCK = 1 << 20
_SPARE = 16  # candidates beyond the K + 1: which of several equal rows faiss returns last is not decided by the row
_RECALL_SAMPLE = 1000

Features = NDArray[np.float32]
Rows = NDArray[np.int64]
Search = Callable[[Features, int], tuple[Features, Rows]]  # queries, count → scores and rows, [B, count] each


def find_neighbors(
    features: Features, *, num_neighbors: int, exact_limit: int = EXACT_LIMIT, use_gpu: bool = False, num_threads: int = 1
) -> Iterator[NeighborTable]:
    """The `num_neighbors` rows nearest to each row by inner product, the row itself left out; of equal ones the lower row first.

    Yields the neighbors of some consecutive images, in order. Memory is bounded by the blocks in work, whatever the number of rows;
    `features`, [N, D] of unit length, may be a memory map. Above `exact_limit` rows an inverted file (IVF) is searched, and its recall
    against the exact search is measured on a sample and logged. DataError if there are not more than `num_neighbors` rows.
    """
    if len(features) <= num_neighbors:
        raise DataError(
            f"{num_neighbors} neighbors are asked for, but there are only {len(features)} images; "
            f"pack more images, or use --neighbors {max(1, len(features) - 1)}"
        )
    former_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        knn: Any = partial(faiss.knn_gpu, faiss.StandardGpuResources()) if use_gpu else faiss.knn
        exact: Search = partial(_exact, features, knn)
        search = exact
        if len(features) > exact_limit:
            search = _approximate(features, exact, use_gpu=use_gpu)
            rows = np.sort(np.random.default_rng(1).choice(len(features), min(len(features), _RECALL_SAMPLE), replace=False))
            both = [_without_self(features, rows, kind, num_neighbors).neighbors for kind in (exact, search)]
            recall = 100 * np.mean([np.isin(true, found).mean() for true, found in zip(*both, strict=True)])
            log.info("neighbors: IVF index with a recall of %.2f %% of the exact %d neighbors of a sample", recall, num_neighbors)
        for start in range(0, len(features), _QUERY_BLOCK):
            yield _without_self(features, np.arange(start, min(start + _QUERY_BLOCK, len(features))), search, num_neighbors)
    finally:
        faiss.omp_set_num_threads(former_threads)


def _without_self(features: Features, rows: Rows, search: Search, num_neighbors: int) -> NeighborTable:
    scores, found = search(np.ascontiguousarray(features[rows]), min(num_neighbors + 1 + _SPARE, len(features)))
    scores[found == rows[:, None]] = -np.inf
    order = np.lexsort((found, -scores), axis=1)[:, :num_neighbors]
    return NeighborTable(neighbors=np.take_along_axis(found, order, axis=1), similarities=np.take_along_axis(scores, order, axis=1))


def _exact(features: Features, knn: Any, queries: Features, count: int) -> tuple[Features, Rows]:
    """Compare with all rows, block by block."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(features), _BASE_BLOCK):
        base = np.ascontiguousarray(features[start : start + _BASE_BLOCK])
        new_scores, new_rows = knn(queries, base, min(count, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = np.concatenate([scores, new_scores], axis=1), np.concatenate([rows, new_rows + start], axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :count]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return scores, rows


def _approximate(features: Features, exact: Search, *, use_gpu: bool) -> Search:
    """An inverted file of half-precision vectors: 2 D bytes of memory per image. Where it finds too few rows, the search is exact."""
    num, dim = features.shape
    num_lists = max(1, int(4 * num**0.5))
    index: Any = faiss.index_factory(dim, f"IVF{num_lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(8, num_lists // 64)
    if use_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    sample = np.random.default_rng(0).choice(num, min(num, 40 * num_lists), replace=False)
    index.train(np.ascontiguousarray(features[np.sort(sample)]))
    for start in range(0, num, _BASE_BLOCK):
        index.add(np.ascontiguousarray(features[start : start + _BASE_BLOCK]))

    def search(queries: Features, count: int) -> tuple[Features, Rows]:
        scores, rows = index.search(queries, count)
        few = (rows < 0).any(axis=1)
        if few.any():
            scores[few], rows[few] = exact(queries[few], count)
        return scores, rows

    return search
