"""Low-shot linear SVMs of the VOC07 protocol: k positives of each class, and as many negatives for each other class."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orl_fast.config import digest
from orl_fast.console import log, progress
from orl_fast.errors import DataError
from orl_fast.evals import svm
from orl_fast.evals.fits import Level, Results

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
NUM_SAMPLES = 5
_FALLBACK_COST = 1.0


def sample_rows(labels: NDArray[np.int8], *, k: int, num_classes: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Rows of k positives and (num_classes - 1) k negatives out of labels [N], ascending; difficult images are neither. A pure function."""
    rng = np.random.RandomState(seed)  # whose numbers no version of NumPy changes
    positives, negatives = (rng.permutation(np.flatnonzero(labels == sign)) for sign in (1, -1))
    return np.sort(np.concatenate([positives[:k], negatives[: (num_classes - 1) * k]]))


def possible_shots(labels: NDArray[np.int8], classes: Sequence[str]) -> tuple[int, ...]:
    """Those of `SHOTS` for which every class has enough positives and negatives; the others are logged. DataError if there are none."""
    num_others = len(classes) - 1
    largest = np.minimum(np.sum(labels > 0, axis=0), np.sum(labels < 0, axis=0) // max(num_others, 1))  # [C]
    shots = tuple(k for k in SHOTS if k <= largest.min())
    scarce = int(largest.argmin())
    why = (
        f"class {classes[scarce]} has {int(np.sum(labels[:, scarce] > 0))} positive and {int(np.sum(labels[:, scarce] < 0))} negative "
        f"trainval images, of which k and {num_others} k are needed"
    )
    if not num_others or not shots:
        raise DataError(f"no low-shot samples can be drawn: {why if num_others else 'there is one class alone'}; give more trainval images")
    if len(shots) < len(SHOTS):
        log.warning("k = %s are skipped: %s", ", ".join(str(k) for k in SHOTS if k not in shots), why)
    return shots


def score_low_shot(
    levels: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], labels: NDArray[np.int8], test_labels: NDArray[np.int8],
    classes: Sequence[str], results: Results, *, costs: tuple[float, ...], official: bool, seed: int, folder: Path,
) -> dict[str, float]:  # fmt: skip
    """mAP of the best level, by k.

    One cost for each level and k, the same for all classes and samples: the one of the largest mean AP on the trainval images outside of
    the samples or, if `official`, on the test images (Goyal et al. choose it there). `folder`: room for what workers share.

    Returns:
        "map_kK" and "std_kK", mean and standard deviation over samples of the mAP on the test images; "map", the mean over k; "best_level",
        the level of the largest; "mean_levelN", the same mean of each level.
    Raises:
        DataError: see `possible_shots`.
    """
    shots, num_classes = possible_shots(labels, classes), len(classes)
    rows = {
        (k, sample, c): sample_rows(labels[:, c], k=k, num_classes=num_classes, seed=(seed, sample, k, c))
        for k in reversed(shots) for sample in range(NUM_SAMPLES) for c in range(num_classes)
    }  # fmt: skip
    name = digest([seed, costs])
    keys = {(level, *task): f"low-shot {name} {level} {' '.join(map(str, task))}" for level in range(1, len(levels) + 1) for task in rows}
    found: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}  # mean and deviation by k, of each level
    with progress("low-shot SVMs", total=len(keys), unit=f"× {len(costs)} fits", done=results.count(keys.values())) as advance:
        for number, (train, test) in enumerate(levels, start=1):
            with Level.open(train, test, folder / f"basis-{number}") as level:
                tasks = [
                    svm.LowShot(
                        key=keys[number, k, sample, c], basis=level.basis, labels=labels[:, c], test_labels=test_labels[:, c],
                        rows=chosen, costs=costs,
                    )
                    for (k, sample, c), chosen in rows.items()
                ]  # fmt: skip
                ahead = len(keys) * float(np.mean(shots)) / max(shots) if not results.count(keys.values()) else 0.0
                results.run(svm.low_shot, tasks, level, advance, ahead=(ahead,), num_levels=len(levels))
            scores = [_of_shot(results, keys, number, k, num_classes, costs, official=official) for k in shots]
            found[number] = np.array([each.mean() for each in scores]), np.array([each.std() for each in scores])
            log.info("level %d: mAP %s %%", number, ", ".join(f"{100 * each.mean():.1f}" for each in scores))
    best = max(found, key=lambda number: float(found[number][0].mean()))
    return {
        "map": float(found[best][0].mean()),
        "best_level": best,
        **{f"map_k{k}": float(value) for k, value in zip(shots, found[best][0], strict=True)},
        **{f"std_k{k}": float(value) for k, value in zip(shots, found[best][1], strict=True)},
        **{f"mean_level{number}": float(means.mean()) for number, (means, _) in found.items()},
    }


def _of_shot(
    results: Results, keys: dict[tuple[int, int, int, int], str], level: int, k: int, num_classes: int, costs: Sequence[float], *,
    official: bool,
) -> NDArray[np.float64]:  # fmt: skip
    """[samples] mAP on the test images, at the chosen cost."""
    records = [[results[keys[level, k, sample, c]] for c in range(num_classes)] for sample in range(NUM_SAMPLES)]
    tested, validated = (np.array([[each[part] for each in of] for of in records], np.float64) for part in ("test", "validation"))
    by_class = tested if official else validated  # [samples, classes, costs], nan where there is no positive
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of means without a value
        means = np.nanmean(by_class, axis=(0, 1))
    cost = _FALLBACK_COST if np.isnan(means).all() else svm.best_cost(costs, means.tolist())
    if np.isnan(means).all():
        log.warning("k = %d: the samples hold all positives, so none is left to choose a cost with; cost %g is used", k, cost)
    return np.asarray(tested[:, :, costs.index(cost)].mean(axis=1), np.float64)
