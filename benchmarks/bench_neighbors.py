"""The nearest neighbors of as many images as COCO has: all products with NumPy, faiss alone, and ours.

Ours is faiss in blocks, without the image itself, which faiss alone returns among the results, and with ties ordered by row.
"""

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Contender, Row, compare
from orl_fast.cores import num_cores
from orl_fast.mining.neighbors import find_neighbors

COCO, DIM, NUM_NEIGHBORS = 118_287, 256, 10
_BLOCK = 1024


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """One group. `source` is not used: features are random, in clusters. About 10 minutes on two cores, seconds with `quick`."""
    del source
    num = 12_000 if quick else COCO
    features = draw_features(num)
    threads = num_cores()
    faiss.omp_set_num_threads(threads)

    def with_numpy() -> float:
        for start in range(0, num, _BLOCK):
            products = features[start : start + _BLOCK] @ features.T
            products[np.arange(len(products)), np.arange(start, start + len(products))] = -np.inf
            best = np.argpartition(-products, NUM_NEIGHBORS, axis=1)[:, :NUM_NEIGHBORS]
            np.take_along_axis(best, np.argsort(-np.take_along_axis(products, best, axis=1), axis=1), axis=1)
        return num

    def with_faiss() -> float:
        faiss.knn(features, features, NUM_NEIGHBORS + 1, metric=faiss.METRIC_INNER_PRODUCT)
        return num

    def ours() -> float:
        return sum(len(block.neighbors) for block in find_neighbors(features, num_neighbors=NUM_NEIGHBORS, num_threads=threads))

    contenders = [
        Contender(name="NumPy, all products", run=with_numpy),
        Contender(name="faiss alone", run=with_faiss),
        Contender(name="find_neighbors", run=ours),
    ]
    group = f"{NUM_NEIGHBORS} neighbors of {num:,} images, {DIM} features, {threads} cores"
    return compare(contenders, unit="images/s", rounds=3, group=group, warmup=quick)


def draw_features(num: int, *, seed: int = 0) -> NDArray[np.float32]:
    """[num, DIM] float32 of unit length, around 500 centers."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(500, DIM)).astype(np.float32)
    features = centers[rng.integers(0, len(centers), num)] + rng.normal(size=(num, DIM)).astype(np.float32)
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), np.float32)
