"""Selective search against OpenCV's, photograph by photograph, each on one core, and over threads.

- proposals: a round is one photograph, done by both; the name of our row gives the share of equal sets of boxes.
- threads: many photographs over nogil threads of one process against one thread.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Contender, Row, compare
from benchmarks.photographs import load_jpegs
from orl_fast.cores import num_cores
from orl_fast.selective_search import Backend, one_opencv_thread, selective_search
from orl_fast.shards.images import decode_rgb

Image = NDArray[np.uint8]


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """Rows in the groups proposals and threads."""
    photos = [_decode(jpeg) for jpeg in load_jpegs(source, limit=3 if quick else 32)]
    with one_opencv_thread():
        return _per_core(photos) + _threads(photos, rounds=2 if quick else 5)


def _decode(jpeg: bytes) -> Image:
    return np.array(decode_rgb(jpeg), np.uint8)


def _per_core(photos: list[Image]) -> list[Row]:
    found: dict[Backend, list[set[tuple[int, ...]]]] = {"opencv": [], "fast": []}

    def search(backend: Backend) -> Callable[[], float]:
        turns = itertools.cycle(photos)

        def one_photograph() -> float:
            boxes = selective_search(next(turns), seed=0, backend=backend)
            found[backend].append({tuple(box) for box in boxes.tolist()})
            return 1

        return one_photograph

    contenders = [Contender(name="OpenCV, 1 thread", run=search("opencv")), Contender(name="orl-fast, 1 thread", run=search("fast"))]
    baseline, ours = compare(contenders, unit="images/s", rounds=len(photos), group="proposals")
    pairs = list(zip(found["opencv"], found["fast"], strict=True))[: len(photos)]  # the uncounted first turn included, the repeat left out
    equal = sum(theirs == own for theirs, own in pairs)
    jaccard = np.mean([len(theirs & own) / len(theirs | own) for theirs, own in pairs])
    return [baseline, replace(ours, name=f"{ours.name} ({equal} of {len(pairs)} sets equal, mean Jaccard {jaccard:.4f})")]


def _threads(photos: list[Image], *, rounds: int) -> list[Row]:
    def search(num_threads: int) -> Callable[[], float]:
        def all_photographs() -> float:
            with ThreadPoolExecutor(num_threads) as pool:
                return sum(1 for _ in pool.map(lambda photo: selective_search(photo, seed=0), photos))

        return all_photographs

    counts = [1, num_cores()] if num_cores() > 1 else [1]
    contenders = [Contender(name=f"orl-fast, {count} thread{'s' * (count > 1)}", run=search(count)) for count in counts]
    return compare(contenders, unit="images/s", rounds=rounds, group="threads")
