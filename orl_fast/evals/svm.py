"""Linear SVMs of the VOC07 protocol (Goyal et al., "Scaling and benchmarking self-supervised visual representation learning", ICCV 2019).

LIBLINEAR draws its random permutations from one generator per process, so fits run in processes, not in threads: a result depends on its
task alone, whatever the number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.files import require_free_space, write_array

COSTS = (1.0, 10.0, 100.0, *(0.5**i for i in range(4, 20)))  # in the reference's order: among costs that do equally well the first is taken
NUM_FOLDS = 3
MAX_STEPS = 2000
_NORM_EPSILON = 1e-5
_POSITIVE_WEIGHT = 2


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Features of one level as files that all processes map: `train` [N, R] and `test` [M, R], float64, with R = min(N, D)."""

    train: Path
    test: Path


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Three-fold cross-validation of one class at one cost."""

    key: str
    basis: Basis
    labels: NDArray[np.int8]  # [N] 1, 0 (difficult) or -1
    cost: float


@dataclass(frozen=True, kw_only=True)
class Refit:
    """A fit to all training images, scored on the test images."""

    key: str
    basis: Basis
    labels: NDArray[np.int8]  # [N]
    test_labels: NDArray[np.int8]  # [M]
    cost: float


@dataclass(frozen=True, kw_only=True)
class LowShot:
    """Fits to a few images at several costs, scored on all other training images, and on the test images."""

    key: str
    basis: Basis
    labels: NDArray[np.int8]  # [N]
    test_labels: NDArray[np.int8]  # [M]
    rows: NDArray[np.int64]  # of the training images, to fit
    costs: tuple[float, ...]


def linear_svm(cost: float) -> Any:
    """The protocol's classifier: LIBLINEAR with an L2 penalty and the squared hinge loss, solved in the dual, positives counting twice."""
    from sklearn.svm import LinearSVC  # heavy, and only fitting needs it

    return LinearSVC(
        C=cost, class_weight={1: _POSITIVE_WEIGHT, -1: 1}, intercept_scaling=1.0, penalty="l2", loss="squared_hinge", tol=1e-4, dual=True,
        max_iter=MAX_STEPS, random_state=0,
    )  # fmt: skip


def normalized(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each row divided by (its L2 norm + 1e-5)."""
    wide = np.asarray(values, np.float64)
    return np.asarray(wide / (np.linalg.norm(wide, axis=1, keepdims=True) + _NORM_EPSILON))


def write_basis(train: NDArray[np.float32], test: NDArray[np.float32], basis: Basis) -> None:
    """Normalize features [N, D] and [M, D], and write them in a basis in which LIBLINEAR is several times as fast.

    The training matrix is factored as L Q with orthonormal rows in Q [R, D] and a lower triangle L [N, R]: where there are fewer images
    than dimensions, rows are shorter and half of their numbers are zeros, which LIBLINEAR leaves out. An SVM sees products of rows only,
    and these are the same, so are its steps, its scores and its number of iterations, within rounding (about 1e-14).
    """
    wide, wide_test = normalized(train), normalized(test)
    num_bytes = 8 * (len(train) + len(test)) * min(wide.shape)
    require_free_space(basis.train, num_bytes=num_bytes, purpose="a level's features in float64")
    if len(wide) < wide.shape[1]:
        q, r = np.linalg.qr(wide.T)
        wide, wide_test = np.ascontiguousarray(r.T), wide_test @ q
    for path, values in ((basis.train, wide), (basis.test, wide_test)):
        write_array(path, values)


def average_precision(labels: NDArray[np.int8], scores: NDArray[np.float64]) -> float:
    """Area under the precision-recall curve, each precision replaced by the largest at the same or a higher recall, over all points.

    Labels [M] are 1, -1, or 0 for images that are left out (difficult); nan without a positive. Images of equal score are retrieved
    together, so that the value does not depend on their order; the reference leaves that order to its sorting.
    """
    kept = labels != 0
    order = np.argsort(-scores[kept], kind="stable")
    ranked, hits = scores[kept][order], labels[kept][order] > 0
    if not hits.any():
        return float("nan")
    last = np.flatnonzero(np.diff(ranked, append=-np.inf))  # of each group of equal scores
    found = np.cumsum(hits)[last]
    precision = np.maximum.accumulate((found / (last + 1))[::-1])[::-1]
    return float(np.sum(np.diff(found, prepend=0) * precision) / hits.sum())


def cross_validate(task: CrossValidation) -> dict[str, Any]:
    """{"ap": average precision as scikit-learn defines it, mean over the folds; "steps": the most that a fit took}."""
    from sklearn.model_selection import cross_validate as in_folds

    with _one_thread():
        found = in_folds(
            linear_svm(task.cost), _mapped(task.basis.train), signs(task.labels), cv=NUM_FOLDS, scoring="average_precision",
            return_estimator=True, error_score="raise",
        )  # fmt: skip
    return {"ap": float(np.mean(found["test_score"])), "steps": max(each.n_iter_ for each in found["estimator"])}


def refit(task: Refit) -> dict[str, Any]:
    """{"ap": `average_precision` on the test images, "steps"}."""
    with _one_thread():
        fitted = linear_svm(task.cost).fit(_mapped(task.basis.train), signs(task.labels))
        scores = fitted.decision_function(_mapped(task.basis.test))
    return {"ap": average_precision(task.test_labels, scores), "steps": fitted.n_iter_}


def low_shot(task: LowShot) -> dict[str, Any]:
    """{"validation", "test": `average_precision` at each cost, None where there is no positive; "steps"}."""
    train, tested = _mapped(task.basis.train), _mapped(task.basis.test)
    rest = task.labels.copy()
    rest[task.rows] = 0
    with _one_thread():
        fits = [linear_svm(cost).fit(train[task.rows], signs(task.labels[task.rows])) for cost in task.costs]
        weights, bias = np.concatenate([fit.coef_ for fit in fits]), np.concatenate([fit.intercept_ for fit in fits])
        values = {}
        for name, labels, features in (("validation", rest, train), ("test", task.test_labels, tested)):
            kept = labels != 0
            scores = features[kept] @ weights.T + bias  # [m, costs]
            found = [average_precision(labels[kept], column) for column in scores.T]
            values[name] = [None if np.isnan(ap) else ap for ap in found]
    return {**values, "steps": max(fit.n_iter_ for fit in fits)}


def signs(labels: NDArray[np.int8]) -> NDArray[np.int64]:
    """What is learned: 1 or -1. Difficult images are negatives."""
    return np.where(labels > 0, 1, -1)


def best_cost(costs: Sequence[float], scores: Sequence[float]) -> float:
    """The cost of the largest score, the first of several; nan counts as the smallest."""
    return costs[int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))]


def _mapped(path: Path) -> NDArray[np.float64]:
    return np.asarray(np.load(path, mmap_mode="r"))  # a plain view: subclasses slow indexing down


def _one_thread() -> Any:
    """One process per core is busy already; and sums do not depend on the number of threads."""
    from contextlib import ExitStack
    from warnings import catch_warnings, simplefilter

    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    stack = ExitStack()
    stack.enter_context(threadpool_limits(1))
    stack.enter_context(catch_warnings())
    simplefilter("ignore", ConvergenceWarning)  # counted by the caller
    return stack
