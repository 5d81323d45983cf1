import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from orl_fast.errors import DataError
from orl_fast.evals import probe
from orl_fast.evals.features import Features
from orl_fast.evals.knn import knn
from orl_fast.evals.probe import COSTS, linear_probe


def _features(seed: int, *, num: int = 150, noise: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, num, p=[0.5, 0.3, 0.2])
    centers = np.random.default_rng(99).normal(0, 1, (3, 6))
    values = (centers[labels] + noise * rng.normal(0, 1, (num, 6))) * [1, 10, 1, 1, 0.01, 1] + 3
    return Features(values=values.astype(np.float32), labels=labels, images=np.arange(num) // 2, num_skipped_images=seed)


def test_probe_is_logistic_regression_on_standardized_features() -> None:
    train, test = _features(0), _features(1)
    found = linear_probe(train, test, cost=0.1)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(train.values.astype(np.float64), train.labels)
    predicted = oracle.predict(test.values.astype(np.float64))
    assert found["top1"] == pytest.approx(float(np.mean(predicted == test.labels)))
    per_class = [float(np.mean(predicted[test.labels == label] == label)) for label in range(3)]
    assert found["mean_class_accuracy"] == pytest.approx(float(np.mean(per_class)))
    assert found["chance"] == pytest.approx(float(np.mean(test.labels == np.bincount(train.labels).argmax())))
    assert (found["num_train"], found["num_test"], found["num_classes"], found["num_skipped_images"]) == (150, 150, 3, 1)


def test_the_cost_is_chosen_without_the_test_data() -> None:
    train = _features(0)
    costs = {linear_probe(train, _features(seed), seed=3)["cost"] for seed in (1, 2)}
    assert len(costs) == 1
    assert costs <= set(COSTS)


def test_knn_equals_a_loop_over_the_definition() -> None:
    train, test = _features(0, noise=2.0), _features(1, noise=2.0)
    found = knn(train, test, num_neighbors=7, temperature=0.2)
    wide = [part.values.astype(np.float64) for part in (train, test)]
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in wide]
    right = 0
    for x, label in zip(unit[1], test.labels, strict=True):
        cosine = unit[0] @ x
        votes = np.zeros(3)
        for i in np.argsort(-cosine)[:7]:
            votes[train.labels[i]] += np.exp(cosine[i] / 0.2)
        right += int(votes.argmax() == label)
    assert found["top1"] == pytest.approx(right / len(test.labels))


def test_knn_takes_all_where_there_are_fewer_than_k_and_a_tiny_temperature_does_not_overflow() -> None:
    train, test = _features(0, num=10), _features(1)
    assert knn(train, test)["num_neighbors"] == 10
    nearest_alone = knn(train, test, temperature=1e-4)["top1"]
    assert nearest_alone == pytest.approx(knn(train, test, num_neighbors=1)["top1"])


def test_knn_in_blocks_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = _features(0, noise=2.0), _features(1, noise=2.0)
    whole = knn(train, test, num_neighbors=40, temperature=0.2)
    for train_block, test_block in ((7, 1000), (1000, 11), (64, 64)):
        monkeypatch.setattr("orl_fast.evals.knn._TRAIN_BLOCK", train_block)
        monkeypatch.setattr("orl_fast.evals.knn._TEST_BLOCK", test_block)
        assert knn(train, test, num_neighbors=40, temperature=0.2) == whole


def test_thousands_of_classes_vote() -> None:
    labels = np.arange(20_000) % 8000
    values = np.random.default_rng(0).normal(0, 1, (20_000, 8)).astype(np.float32)
    train, test = (
        Features(values=values[part], labels=labels[part], images=np.arange(len(labels[part]))) for part in (slice(None), slice(64))
    )
    found = knn(train, test, num_neighbors=1)
    assert found["top1"] == 1  # each finds itself
    assert found["num_classes"] == 8000


def test_weights_beyond_the_memory_are_refused_with_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "available_memory", lambda: 8_000_000_000)
    probe.require_memory(437_513, 2048, 8142)  # iNaturalist 2018
    with pytest.raises(DataError, match=r"2,048 features and 21,841 classes takes about 11\.\d GB .* use orl-fast eval linear or knn"):
        probe.require_memory(437_513, 2048, 21_841)
    monkeypatch.setattr(probe, "available_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"1\.0 kB are available"):
        linear_probe(_features(0), _features(1))


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("cost", [0.01, 1.0, None])
def test_objects_beyond_the_memory_are_fitted_in_parts_with_equal_results(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, cost: float | None
) -> None:
    parts = [_features(seed, num=600, noise=2) for seed in (0, 1)]
    train, test = (
        Features(values=part.values[part.labels < num_classes], labels=part.labels[part.labels < num_classes] + 5,
                 images=part.images[part.labels < num_classes]) for part in parts
    )  # fmt: skip
    whole = linear_probe(train, test, cost=cost)
    direct = probe._fit(train, test, np.ones(len(train.labels), bool), None, cost=cost or 1.0)
    monkeypatch.setattr(probe, "_PART", 64)
    in_parts = probe._fit_in_parts(train, test, np.ones(len(train.labels), bool), None, cost=cost or 1.0)
    assert np.mean(direct == in_parts) > 0.995  # a tie within rounding apart
    _, needed = probe._memory_of_fit(len(train.labels), 6, num_classes)
    monkeypatch.setattr(probe, "available_memory", lambda: needed)
    monkeypatch.setattr(probe, "_memory_of_fit", lambda *_: (needed + 1, needed))
    found = linear_probe(train, test, cost=cost)
    assert found["cost"] == whole["cost"]
    assert found["top1"] == pytest.approx(whole["top1"], abs=0.005)


@pytest.mark.parametrize("score", [linear_probe, knn])
def test_one_class_cannot_be_scored(score) -> None:  # type: ignore[no-untyped-def]
    one = Features(values=np.ones((4, 2), np.float32), labels=np.zeros(4, np.int64), images=np.arange(4), num_skipped_images=2)
    with pytest.raises(DataError, match="1 classes to learn"):
        score(one, _features(0))


def test_a_fit_that_does_not_converge_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(probe.log, "warning", lambda message, *values: messages.append(message % values))
    monkeypatch.setattr(probe, "_MAX_STEPS", 1)
    linear_probe(_features(0), _features(1), cost=1.0)
    assert messages == ["linear probe: the fit with C = 1 did not converge in 1 steps"]
