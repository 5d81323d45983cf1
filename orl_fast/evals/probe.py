"""Linear probe: how well a linear classifier reads the class out of frozen features."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
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
_MIN_STD = 1e-6
_PART = 4096  # objects in memory at a time, where all at once are too many
_NOT_CONVERGED = "linear probe: the fit with C = %g did not converge in %d steps"


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
    whole, _ = _memory_of_fit(len(train.labels), train.values.shape[1], len(np.unique(train.labels)))
    fit = partial(_fit if whole <= available_memory() else _fit_in_parts, train, test)
    everything = np.ones(len(train.labels), np.bool_)
    if cost is None:
        images = np.random.default_rng(seed).permutation(np.unique(train.images))
        held_out = np.isin(train.images, images[: round(_VALIDATION_SHARE * len(images))])  # [M] objects of a fifth of the images
        cost = COSTS[0]
        if len(np.unique(train.labels[~held_out])) >= 2 and held_out.any():
            fits = {c: fit(~held_out, held_out, cost=c) for c in COSTS}
            cost = max(COSTS, key=lambda c: float(np.mean(fits[c] == train.labels[held_out])))
    predicted = fit(everything, None, cost=cost)
    return {**scores(predicted, train, test), "cost": cost}


def require_memory(num_objects: int, num_features: int, num_classes: int) -> None:
    """Refuse weights that L-BFGS cannot hold in memory: a DataError that names other evaluations."""
    _, needed = _memory_of_fit(num_objects, num_features, num_classes)
    if needed > (available := available_memory()):
        raise DataError(
            f"logistic regression of {num_features:,} features and {num_classes:,} classes takes about {human_bytes(needed)} of memory, "
            f"{human_bytes(available)} are available; use orl-fast eval linear or knn, or fewer classes"
        )


def _memory_of_fit(num_objects: int, num_features: int, num_classes: int) -> tuple[int, int]:
    """Bytes that L-BFGS takes with all objects at once, and with a part of them at a time.

    All at once: standardized features and two copies, in float32; logits, probabilities and their gradient, in float32; and twenty
    earlier steps and gradients of all weights, in float64. In parts: these, and a part's logits and features.
    """
    weights = 8 * (2 * 12 + 4) * num_features * num_classes
    whole = 4 * num_objects * (3 * num_features + 3 * num_classes) + 8 * 2 * 12 * num_features * num_classes
    return whole, weights + 4 * 3 * _PART * (num_features + num_classes)


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


def _fit(train: Features, test: Features, learned: NDArray[np.bool_], asked: NDArray[np.bool_] | None, *, cost: float) -> NDArray[np.int64]:
    """Learn from some training objects [N]; the predicted labels of some other ones, or of the test objects."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # heavy, and only fitting needs it

    center, scale = train.values.mean(0), train.values.std(0) + _MIN_STD
    classifier = LogisticRegression(C=cost, max_iter=_MAX_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(((train.values - center) / scale)[learned], train.labels[learned])
    if (classifier.n_iter_ >= _MAX_STEPS).any():
        log.warning(_NOT_CONVERGED, cost, _MAX_STEPS)
    values = test.values if asked is None else train.values[asked]
    return np.asarray(classifier.predict((values - center) / scale), np.int64)


def _fit_in_parts(
    train: Features, test: Features, learned: NDArray[np.bool_], asked: NDArray[np.bool_] | None, *, cost: float
) -> NDArray[np.int64]:
    """As `_fit`, the same loss by the same L-BFGS, with a part of the objects in memory at a time."""
    from scipy.optimize import minimize

    rows, (classes, labels) = np.flatnonzero(learned), np.unique(train.labels[learned], return_inverse=True)
    shape = (len(classes), train.values.shape[1] + 1)  # the last column is the bias
    center, scale = _moments(train.values)
    strength = cost * len(rows) / (2 if len(classes) == 2 else 1)  # for two classes, scikit-learn penalizes the difference of their weights
    targets = torch.from_numpy(labels)

    def parts(values: NDArray[np.float32], chosen: NDArray[np.int64]) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(chosen), _PART):
            part = slice(start, start + _PART)
            standardized = (values[chosen[part]] - center) / scale
            yield part, torch.from_numpy(np.pad(standardized, ((0, 0), (0, 1)), constant_values=1).astype(np.float32))

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = torch.from_numpy(flat.reshape(shape).astype(np.float32))
        gradient, total = np.zeros(shape), 0.0
        for part, features in parts(train.values, rows):
            logs = torch.log_softmax(features @ weights.T, dim=1)
            own = targets[part][:, None]
            total -= float(logs.gather(1, own).sum(dtype=torch.float64))
            off = logs.exp_().scatter_add_(1, own, torch.full(own.shape, -1.0))
            gradient += (off.T @ features).numpy()
        penalized = flat.reshape(shape).copy()
        penalized[:, -1] = 0
        return (
            total / len(rows) + float((penalized**2).sum()) / (2 * strength),
            (gradient / len(rows) + penalized / strength).ravel(),
        )

    log.info("linear probe: fitting with C = %g, %d objects at a time", cost, _PART)
    options = {"maxiter": _MAX_STEPS, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(np.float64).eps}  # scikit-learn's
    found = minimize(loss, np.zeros(shape).ravel(), method="L-BFGS-B", jac=True, options=options)
    if found.nit >= _MAX_STEPS:
        log.warning(_NOT_CONVERGED, cost, _MAX_STEPS)
    weights = torch.from_numpy(found.x.reshape(shape).astype(np.float32))
    values, chosen = (test.values, np.arange(len(test.labels))) if asked is None else (train.values, np.flatnonzero(asked))
    best = [(features @ weights.T).argmax(dim=1).numpy() for _, features in parts(values, chosen)]
    return np.asarray(classes[np.concatenate(best)], np.int64)


def _moments(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each column, a part of the rows at a time."""
    starts = range(0, len(values), _PART)
    mean = np.sum([values[start : start + _PART].sum(0, dtype=np.float64) for start in starts], axis=0) / len(values)
    squares = np.sum([((values[start : start + _PART] - mean) ** 2).sum(0) for start in starts], axis=0)
    return mean.astype(np.float32), (np.sqrt(squares / len(values)) + _MIN_STD).astype(np.float32)
