"""The protocol's SVMs against scikit-learn called directly, and average precision against slower definitions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from orl_fast.evals import svm
from orl_fast.evals.svm import Basis, CrossValidation, LowShot, Refit, average_precision, normalized, write_basis


def _features(num: int, dimensions: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Not negative, like pooled activations, and labels that they tell in part: 1, -1, and some 0."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num, 8))
    mixing = np.random.default_rng(99).normal(size=(8, dimensions))
    values = np.maximum(hidden @ mixing + rng.normal(size=(num, dimensions)), 0).astype(np.float32)
    labels = np.where(hidden[:, 0] + 0.5 * rng.normal(size=num) > 0.7, 1, -1)
    labels[rng.random(num) < 0.08] = 0
    return values, labels.astype(np.int8)


def _directly(cost: float) -> LinearSVC:
    weight = {1: 2, -1: 1}
    return LinearSVC(C=cost, class_weight=weight, dual=True, loss="squared_hinge", max_iter=2000, tol=1e-4, random_state=0)


@pytest.fixture(params=[(90, 300), (90, 20)], ids=["fewer images than dimensions", "more"])
def problem(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Basis, list[NDArray[np.float64]], list[NDArray[np.int8]]]:
    train, labels = _features(*request.param, seed=0)
    test, test_labels = _features(60, request.param[1], seed=1)
    train[5] = train[3]  # a repeated image: rows are dependent
    basis = Basis(train=tmp_path / "train.npy", test=tmp_path / "test.npy")
    write_basis(train, test, basis)
    return (
        basis,
        [x.astype(np.float64) / (np.linalg.norm(x.astype(np.float64), axis=1) + 1e-5)[:, None] for x in (train, test)],
        [labels, test_labels],
    )


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
@pytest.mark.parametrize("cost", [100.0, 1.0, 0.5**6, 0.5**19])
def test_fits_are_scikit_learns(problem: tuple[Basis, list[NDArray[np.float64]], list[NDArray[np.int8]]], cost: float) -> None:
    basis, (train, test), (labels, test_labels) = problem
    signs = np.where(labels == 1, 1, -1)  # difficult images are negatives
    expected = cross_val_score(_directly(cost), train, signs, cv=3, scoring="average_precision")
    fitted = _directly(cost).fit(train, signs)
    found = svm.cross_validate(CrossValidation(key="", basis=basis, labels=labels, cost=cost))
    assert found["ap"] == pytest.approx(expected.mean(), abs=1e-12)
    tested = svm.refit(Refit(key="", basis=basis, labels=labels, test_labels=test_labels, cost=cost))
    scores = fitted.decision_function(test)
    assert tested["ap"] == pytest.approx(_plain_ap(test_labels[test_labels != 0] == 1, scores[test_labels != 0]), abs=1e-12)
    assert tested["steps"] == fitted.n_iter_
    mapped = _directly(cost).fit(np.load(basis.train), signs).decision_function(np.load(basis.test))
    np.testing.assert_allclose(mapped, scores, rtol=0, atol=1e-9)


def test_low_shot_fits_see_their_rows_alone(problem: tuple[Basis, list[NDArray[np.float64]], list[NDArray[np.int8]]]) -> None:
    basis, (train, test), (labels, test_labels) = problem
    rows = np.sort(np.concatenate([np.flatnonzero(labels == 1)[:4], np.flatnonzero(labels == -1)[:12]]))
    found = svm.low_shot(LowShot(key="", basis=basis, labels=labels, test_labels=test_labels, rows=rows, costs=(1.0, 0.5**6)))
    for index, cost in enumerate((1.0, 0.5**6)):
        fitted = _directly(cost).fit(train[rows], labels[rows])
        rest = np.setdiff1d(np.flatnonzero(labels), rows)
        validation = _plain_ap(labels[rest] == 1, fitted.decision_function(train[rest]))
        assert found["validation"][index] == pytest.approx(validation, abs=1e-12)
        tested = _plain_ap(test_labels[test_labels != 0] == 1, fitted.decision_function(test[test_labels != 0]))
        assert found["test"][index] == pytest.approx(tested, abs=1e-12)
    none_left = np.flatnonzero(labels == 1)
    rows = np.sort(np.concatenate([none_left, np.flatnonzero(labels == -1)[:20]]))
    alone = svm.low_shot(LowShot(key="", basis=basis, labels=labels, test_labels=test_labels, rows=rows, costs=(1.0,)))
    assert alone["validation"] == [None]


def test_features_of_another_backbone_in_the_same_place_are_read_again(tmp_path: Path) -> None:
    basis = Basis(train=tmp_path / "train.npy", test=tmp_path / "test.npy")
    found = []
    for seed in (0, 1, 0):
        values, _ = _features(60, 30, seed)
        write_basis(values, values[:10], basis)
        found.append(svm.cross_validate(CrossValidation(key="", basis=basis, labels=_features(60, 30, 0)[1], cost=1.0))["ap"])
    assert found[0] == found[2] != found[1]


def test_rows_are_divided_by_their_norm_and_a_little() -> None:
    values = np.array([[3, 4], [0, 0]], np.float32)
    assert normalized(values).tolist() == [[3 / 5.00001, 4 / 5.00001], [0, 0]]


def test_costs_are_the_protocols() -> None:
    assert sorted(svm.COSTS) == sorted([0.5**i for i in range(4, 20)] + [1, 10, 100])
    assert svm.best_cost((1.0, 10.0, 100.0), (0.5, 0.7, 0.7)) == 10.0
    assert svm.best_cost((1.0, 10.0), (float("nan"), 0.1)) == 10.0


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, -1, 1, -1], [4, 3, 2, 1], 1 / 2 * 1 + 1 / 2 * 2 / 3),
        ([-1, 1, 1, -1], [4, 3, 2, 1], 2 / 3),  # 1/2, then 2/3: the larger precision at a higher recall counts for both
        ([1, 0, -1, 1], [1, 9, 3, 2], 2 / 3),  # the difficult one at the top is left out
        ([-1, -1, 1], [3, 2, 1], 1 / 3),
        ([1, -1, -1, 1], [5, 5, 5, 5], 2 / 4),  # retrieved together
        ([1, -1, 1], [2, 1, 1], 1 / 2 * 1 + 1 / 2 * 2 / 3),
        ([1, 1], [0.5, -1], 1),
    ],
)
def test_average_precision_by_hand(labels: list[int], scores: list[float], expected: float) -> None:
    assert average_precision(np.array(labels, np.int8), np.array(scores, np.float64)) == pytest.approx(expected)


def test_average_precision_needs_a_positive() -> None:
    assert np.isnan(average_precision(np.array([-1, 0], np.int8), np.array([0.1, 0.2])))


def _plain_ap(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """For each positive, the best precision of any threshold that retrieves it: the area under the envelope, by its definition."""
    thresholds = np.unique(scores)
    precisions = np.array([positive[scores >= threshold].mean() for threshold in thresholds])
    return float(np.mean([precisions[thresholds <= score].max() for score in scores[positive]]))


_Ranked = st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(-5, 5)), min_size=1, max_size=40)


@given(ranked=_Ranked)
@settings(deadline=None, max_examples=300, derandomize=True, database=None)
def test_average_precision_is_the_best_precision_for_each_positive_whatever_the_order(ranked: list[tuple[int, int]]) -> None:
    labels, scores = np.array([label for label, _ in ranked], np.int8), np.array([float(score) for _, score in ranked])
    found = average_precision(labels, scores)
    if not (labels == 1).any():
        assert np.isnan(found)
        return
    assert found == pytest.approx(_plain_ap(labels[labels != 0] == 1, scores[labels != 0]))
    order = np.random.default_rng(len(ranked)).permutation(len(ranked))
    assert average_precision(labels[order], scores[order]) == found
    assert average_precision(labels, 3 * scores - 7) == found


@given(labels=st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
@settings(deadline=None, max_examples=200, derandomize=True, database=None)
def test_without_ties_it_is_the_references_curve(labels: list[bool]) -> None:
    """The area of the monotone curve through (recall, precision) of every cut of the ranking, between (0, ·) and (1, 0)."""
    hits = np.array(labels)
    recall = np.concatenate([[0], np.cumsum(hits) / hits.sum(), [1]])
    precision = np.concatenate([[0], np.cumsum(hits) / np.arange(1, len(hits) + 1), [0]])
    area = sum((recall[i] - recall[i - 1]) * precision[i:].max() for i in range(1, len(recall)))
    assert average_precision(np.where(hits, 1, -1).astype(np.int8), -np.arange(len(hits), dtype=np.float64)) == pytest.approx(area)
