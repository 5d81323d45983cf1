"""Linear probe: how well a linear classifier reads the class out of frozen features."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.features import Features, encode_labelled
from orl_fast.evals.labels import LabelledOptions, labelled_data
from orl_fast.files import human_bytes
from orl_fast.memory import available_memory
from orl_fast.models import Encoder

SCORES = {"top1": "top-1", "mean_class_accuracy": "mean per class", "chance": "chance"}
COSTS = (0.001, 0.01, 0.1, 1.0)
_VALIDATION_SHARE = 0.2
_MAX_STEPS = 300


class Options(LabelledOptions):
    cost: float | None = Field(default=None, gt=0, description="scikit-learn's C [default: chosen by validation].")


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    objects, _ = labelled_data(data, options, context)  # read once
    require_memory(len(objects), encoder.num_features, len(objects.classes))  # before anything is encoded
    train, test = encode_labelled(encoder, data, options, context)
    return linear_probe(train, test, cost=options.cost, seed=options.seed)


def summary(values: dict[str, float]) -> str:
    return f"{counts(values)}; C = {values['cost']:g}. Chance: always the most frequent class."


def counts(values: dict[str, float]) -> str:
    """What was learned from and tested, in words."""
    skipped = f"{values['num_skipped_images']:g} images and {values['num_skipped_objects']:g} objects skipped"
    return f"{values['num_train']:g} objects trained on, {values['num_test']:g} tested, {values['num_classes']:g} classes; {skipped}"


def linear_probe(train: Features, test: Features, *, cost: float | None = None, seed: int = 0) -> dict[str, float]:
    """Fit a logistic regression to standardized training features, score it on the test features.

    Args:
        cost: inverse strength of the L2 penalty (scikit-learn's C); None: the one of `COSTS` that does best on a fifth of the training
            images, held out for this choice; then all training objects are fitted.
        seed: of that choice.
    Returns:
        "top1" and "mean_class_accuracy" (both 0 to 1), "chance" (top1 of always answering the most frequent training class), "cost",
        "num_train", "num_test", "num_classes", "num_skipped_images", "num_skipped_objects".
    Raises:
        DataError: fewer than two classes to learn, nothing to test, or more than fits into memory.
    """
    check_parts(train, test)
    require_memory(len(train.labels), train.values.shape[1], len(np.unique(train.labels)))
    center, scale = train.values.mean(0), train.values.std(0) + 1e-6
    train_x, test_x = (train.values - center) / scale, (test.values - center) / scale
    if cost is None:
        images = np.random.default_rng(seed).permutation(np.unique(train.images))
        held_out = np.isin(train.images, images[: round(_VALIDATION_SHARE * len(images))])  # [M] objects of a fifth of the images
        cost = COSTS[0]
        if len(np.unique(train.labels[~held_out])) >= 2 and held_out.any():
            fits = {c: _fit(train_x[~held_out], train.labels[~held_out], train_x[held_out], cost=c) for c in COSTS}
            cost = max(COSTS, key=lambda c: float(np.mean(fits[c] == train.labels[held_out])))
    predicted = _fit(train_x, train.labels, test_x, cost=cost)
    return {**scores(predicted, train, test), "cost": cost}


def require_memory(num_objects: int, num_features: int, num_classes: int) -> None:
    """Refuse a fit that does not fit into memory: a DataError that names other evaluations.

    L-BFGS works on all objects at once: standardized features and two copies, in float32; logits, probabilities and their gradient, in
    float32; and twenty earlier steps and gradients of all weights, in float64.
    """
    needed = 4 * num_objects * (3 * num_features + 3 * num_classes) + 8 * 2 * 12 * num_features * num_classes
    if needed > (available := available_memory()):
        raise DataError(
            f"logistic regression of {num_objects:,} objects, {num_features:,} features and {num_classes:,} classes takes about "
            f"{human_bytes(needed)} of memory, {human_bytes(available)} are available; use orl-fast eval linear or knn, or fewer images"
        )


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
        "num_skipped_images": train.num_skipped_images + test.num_skipped_images,
        "num_skipped_objects": train.num_skipped_objects + test.num_skipped_objects,
    }


def check_parts(train: Features, test: Features) -> None:
    if len(np.unique(train.labels)) < 2 or not len(test.labels):
        raise DataError(
            f"{len(np.unique(train.labels))} classes to learn and {len(test.labels)} objects to test are left after "
            f"{train.num_skipped_images + test.num_skipped_images} images were skipped; at least 2 and 1 are needed"
        )


def _fit(train_x: NDArray[np.float32], labels: NDArray[np.int64], test_x: NDArray[np.float32], *, cost: float) -> NDArray[np.int64]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # heavy, and only fitting needs it

    classifier = LogisticRegression(C=cost, max_iter=_MAX_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train_x, labels)
    if (classifier.n_iter_ >= _MAX_STEPS).any():
        log.warning("linear probe: the fit with C = %g did not converge in %d steps", cost, _MAX_STEPS)
    return np.asarray(classifier.predict(test_x), np.int64)
