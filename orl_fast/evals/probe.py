"""Linear probe: how well a linear classifier reads the class out of frozen features."""

import warnings

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError
from orl_fast.evals.features import Features

COSTS = (0.001, 0.01, 0.1, 1.0)
_VALIDATION_SHARE = 0.2


def linear_probe(train: Features, test: Features, *, cost: float | None = None, seed: int = 0) -> dict[str, float]:
    """Fit a logistic regression to standardized training features, score it on the test features.

    Args:
        train, test: frozen features of labelled objects.
        cost: inverse strength of the L2 penalty (scikit-learn's C); None: the one of `COSTS` that does best on a fifth of the training
            images, held out for this choice; then all training objects are fitted.
        seed: of that choice.
    Returns:
        "top1" and "mean_class_accuracy" (both 0 to 1), "chance" (top1 of always answering the most frequent training class), "cost",
        "num_train", "num_test", "num_classes", "num_skipped".
    Raises:
        DataError: fewer than two classes to learn, or nothing to test.
    """
    check_parts(train, test)
    center, scale = train.values.mean(0), train.values.std(0) + 1e-6
    train_x, test_x = (train.values - center) / scale, (test.values - center) / scale
    if cost is None:
        held_out = _held_out(train, seed=seed)
        cost = COSTS[0]
        if len(np.unique(train.labels[~held_out])) >= 2 and held_out.any():
            fits = {c: _fit(train_x[~held_out], train.labels[~held_out], train_x[held_out], cost=c) for c in COSTS}
            cost = max(COSTS, key=lambda c: float(np.mean(fits[c] == train.labels[held_out])))
    predicted = _fit(train_x, train.labels, test_x, cost=cost)
    return {**scores(predicted, train, test), "cost": cost}


def scores(predicted: NDArray[np.int64], train: Features, test: Features) -> dict[str, float]:
    """What every classifying evaluation reports of its predicted labels [M]."""
    right = predicted == test.labels
    most_frequent = np.bincount(train.labels).argmax()
    return {
        "top1": float(right.mean()),
        "mean_class_accuracy": float(np.mean([right[test.labels == label].mean() for label in np.unique(test.labels)])),
        "chance": float(np.mean(test.labels == most_frequent)),
        "num_train": len(train.labels),
        "num_test": len(test.labels),
        "num_classes": len(np.unique(train.labels)),
        "num_skipped": train.num_skipped + test.num_skipped,
    }


def check_parts(train: Features, test: Features) -> None:
    if len(np.unique(train.labels)) < 2 or not len(test.labels):
        raise DataError(
            f"{len(np.unique(train.labels))} classes to learn and {len(test.labels)} objects to test are left after "
            f"{train.num_skipped + test.num_skipped} unreadable images were skipped; at least 2 and 1 are needed"
        )


def _held_out(train: Features, *, seed: int) -> NDArray[np.bool_]:
    """[M] True for the objects of a fifth of the images."""
    images = np.random.default_rng(seed).permutation(np.unique(train.images))
    return np.isin(train.images, images[: round(_VALIDATION_SHARE * len(images))])


def _fit(train_x: NDArray[np.float32], labels: NDArray[np.int64], test_x: NDArray[np.float32], *, cost: float) -> NDArray[np.int64]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # heavy, and only fitting needs it

    with warnings.catch_warnings():
        # Weak penalties need many steps; where they run out, the fit is as good as done, and validation has its say.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = LogisticRegression(C=cost, max_iter=300).fit(train_x, labels)
    return np.asarray(classifier.predict(test_x), np.int64)
