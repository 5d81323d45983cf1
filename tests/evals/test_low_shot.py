"""Low-shot samples, and how their scores are put together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orl_fast.errors import DataError
from orl_fast.evals import low_shot, svm
from orl_fast.evals.fits import Results
from orl_fast.evals.low_shot import NUM_SAMPLES, possible_shots, sample_rows, score_low_shot

CLASSES = ("a", "b", "c")


def _labels(num: int, seed: int = 0) -> NDArray[np.int8]:
    return np.random.default_rng(seed).choice([1, -1, 0], size=(num, len(CLASSES)), p=[0.25, 0.65, 0.1]).astype(np.int8)


@given(k=st.integers(1, 8), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=50, derandomize=True, database=None)
def test_a_sample_has_k_positives_and_k_negatives_for_each_other_class(k: int, seed: int) -> None:
    labels = _labels(120)[:, 0]
    rows = sample_rows(labels, k=k, num_classes=4, seed=(seed, 1, k, 0))
    assert (np.diff(rows) > 0).all()
    assert (int(np.sum(labels[rows] == 1)), int(np.sum(labels[rows] == -1)), len(rows)) == (k, 3 * k, 4 * k)
    assert np.array_equal(rows, sample_rows(labels, k=k, num_classes=4, seed=(seed, 1, k, 0)))
    assert not np.array_equal(rows, sample_rows(labels, k=k, num_classes=4, seed=(seed, 2, k, 0)))


def test_samples_are_fixed() -> None:
    """A published number depends on them: they may not change."""
    labels = np.tile(np.array([1, -1, -1, -1, 0], np.int8), 20)
    assert sample_rows(labels, k=2, num_classes=3, seed=(0, 0, 2, 0)).tolist() == [12, 21, 30, 32, 50, 67]


def test_shots_that_a_class_has_too_few_images_for_are_left_out() -> None:
    labels = np.full((100, 3), -1, np.int8)
    for c, num in enumerate((40, 9, 30)):
        labels[:num, c] = 1
    labels[:2, 1] = 0  # difficult ones do not count
    assert possible_shots(labels, CLASSES) == (1, 2, 4)
    labels[:, 2] = 1
    labels[0, 2] = -1  # one negative, two are needed
    with pytest.raises(DataError, match="class c has 99 positive and 1 negative trainval images, of which k and 2 k are needed"):
        possible_shots(labels, CLASSES)
    with pytest.raises(DataError, match="there is one class alone"):
        possible_shots(labels[:, :1], CLASSES[:1])


@pytest.mark.parametrize("official", [False, True])
def test_scores_are_those_of_the_cost_chosen_for_k(tmp_path: Path, official: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_shot, "SHOTS", (1, 3))
    rng = np.random.default_rng(0)
    labels, test_labels = _labels(60), _labels(40, seed=1)
    levels = [
        tuple((rng.random((len(of), 30)) + strength * (of @ mixing > 0)).astype(np.float32) for of in (labels, test_labels))
        for strength, mixing in ((0.0, np.ones((3, 30))), (0.5, rng.normal(size=(3, 30))))
    ]
    costs = (1.0, 0.5**8)
    results = Results(tmp_path / "svm.jsonl", num_workers=1)
    found = score_low_shot(levels, labels, test_labels, CLASSES, results, costs=costs, official=official, seed=3, folder=tmp_path)
    means: dict[int, list[float]] = {1: [], 2: []}
    for number, (train, test) in enumerate(levels, start=1):
        for k in (1, 3):
            aps = np.empty((2, NUM_SAMPLES, len(CLASSES), len(costs)))  # validation, test
            for sample in range(NUM_SAMPLES):
                for c in range(len(CLASSES)):
                    rows = sample_rows(labels[:, c], k=k, num_classes=3, seed=(3, sample, k, c))
                    rest = np.setdiff1d(np.arange(len(labels)), rows)
                    for i, cost in enumerate(costs):
                        fitted = svm.linear_svm(cost).fit(svm.normalized(train)[rows], labels[rows, c])
                        validation = svm.average_precision(labels[rest, c], fitted.decision_function(svm.normalized(train)[rest]))
                        tested = svm.average_precision(test_labels[:, c], fitted.decision_function(svm.normalized(test)))
                        aps[:, sample, c, i] = validation, tested
            chosen = aps[1 if official else 0].mean(axis=(0, 1)).argmax()
            by_sample = aps[1, :, :, chosen].mean(axis=1)
            means[number].append(by_sample.mean())
            if number == found["best_level"]:
                assert found[f"map_k{k}"] == pytest.approx(by_sample.mean())
                assert found[f"std_k{k}"] == pytest.approx(by_sample.std())
        assert found[f"mean_level{number}"] == pytest.approx(np.mean(means[number]))
    assert found["map"] == pytest.approx(max(np.mean(values) for values in means.values()))


def test_where_samples_take_all_positives_the_cost_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_shot, "SHOTS", (2,))
    rng = np.random.default_rng(0)
    labels = np.full((20, 3), -1, np.int8)
    labels[[0, 1], 0] = labels[[2, 3], 1] = labels[[4, 5], 2] = 1
    levels = [(rng.random((20, 8), dtype=np.float32), rng.random((20, 8), dtype=np.float32))]
    arguments = (levels, labels, labels, CLASSES)
    several, one = (
        score_low_shot(*arguments, Results(tmp_path / f"{len(costs)}", num_workers=1), costs=costs, official=False, seed=0, folder=tmp_path)
        for costs in ((10.0, 1.0, 0.25), (1.0,))
    )
    assert several == one
