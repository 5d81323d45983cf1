"""VOC07 classification: linear SVMs on five levels of frozen features.

DATA is VOC2007, VOCdevkit, or a folder above. For each level, class and cost, three-fold cross-validation on trainval chooses the cost of a
class; the SVM is fitted again to all of trainval and tested on test. The score is the mAP over classes of the best level.

With --low-shot, SVMs are fitted to k positives and 19 k negatives of each class, for k of 1 to 96 and five fixed samples; the score is the
mean over k of the mean mAP over samples.

Features, and results of single fits, are kept next to evals.jsonl: a killed run loses the fits in progress, and further runs with the same
encoder and images use what is there.
"""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from orl_fast.config import Section, digest
from orl_fast.console import log, progress
from orl_fast.errors import DataError
from orl_fast.evals import Context, svm
from orl_fast.evals.fits import Level, Results
from orl_fast.evals.levels import Levels, encode_levels
from orl_fast.evals.low_shot import SHOTS, score_low_shot
from orl_fast.evals.voc import Split, read_voc
from orl_fast.files import locked, remove_leftovers
from orl_fast.models import Encoder

SCORES = {
    "map": "mAP",
    **{f"map_level{level}": f"level {level}" for level in range(1, 6)},
    **{f"map_k{k}": f"k = {k}" for k in SHOTS},
}
FAST_COSTS = (1.0, 10.0, 100.0, 0.5**4, 0.5**7, 0.5**10)
_FORMAT = 1  # of the kept results, and of how they are computed
_ValuePairs = Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]


class Options(Section):
    """Images are resized to a shorter side of 8/7 of --size, then to --size squared, without a crop."""

    low_shot: bool = Field(default=False, description="Fit few images of each class.")
    fast: bool = Field(default=False, description="6 costs instead of 19; docs/evaluation.md has the measured difference.")
    cost_choice: Literal["validation", "official"] = Field(
        default="validation",
        description="With --low-shot, the cost for each k: by the mAP on the trainval images outside of the samples; or, as the reference "
        "does it, on the test images, which makes scores too high.",
    )
    size_px: int = Field(default=224, ge=8, description="Side of the encoded views in pixels.")
    seed: int = Field(default=0, ge=0, description="Of the low-shot samples.")

    @model_validator(mode="after")
    def _low_shot_only(self) -> Self:
        if self.cost_choice != "validation" and not self.low_shot:
            raise ValueError("--cost-choice is for --low-shot; otherwise costs are always chosen by cross-validation")
        return self


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    voc = read_voc(data)
    splits = (voc.trainval, voc.test)
    with ExitStack() as stack:
        home = _home(context.work, stack)
        parts = [encode_levels(encoder, split.paths, size_px=options.size_px, folder=home, context=context) for split in splits]
        labels, test_labels, classes = _scorable(splits, parts, voc.classes)
        num_skipped = sum(split.num_missing + int(np.sum(~part.kept)) for split, part in zip(splits, parts, strict=True))
        counts = {
            "num_trainval": len(labels),
            "num_test": len(test_labels),
            "num_classes": len(classes),
            "num_positive_labels": int(np.sum(labels > 0) + np.sum(test_labels > 0)),
            "num_difficult_labels": int(np.sum(labels == 0) + np.sum(test_labels == 0)),
            "num_skipped_images": num_skipped,
            "num_skipped_classes": len(voc.classes) - len(classes),
        }
        log.info("%s", ", ".join(f"{key.removeprefix('num_').replace('_', ' ')} {count}" for key, count in counts.items()))
        levels = list(zip(parts[0].values, parts[1].values, strict=True))
        data_key = [[part.fingerprint, np.flatnonzero(~part.kept).tolist()] for part in parts]
        name = digest([_FORMAT, data_key, classes, labels.tolist(), test_labels.tolist()])
        results = Results(home / f"svm-{name}.jsonl", num_workers=context.num_threads)
        costs = FAST_COSTS if options.fast else svm.COSTS
        if options.low_shot:
            official = options.cost_choice == "official"
            values = score_low_shot(
                levels, labels, test_labels, classes, results, costs=costs, official=official, seed=options.seed, folder=home
            )
        else:
            values = score_all(levels, labels, test_labels, classes, results, costs=costs, folder=home)
    if results.num_unconverged:
        log.info(
            "%d results rest on fits that end at LIBLINEAR's limit of %d iterations, as in the protocol",
            results.num_unconverged,
            svm.MAX_STEPS,
        )
    return {**values, **counts, "num_unconverged": results.num_unconverged}


def summary(values: dict[str, float]) -> str:
    counts = (
        f"{values['num_trainval']:g} trainval and {values['num_test']:g} test images, {values['num_classes']:g} classes; "
        f"{values['num_skipped_images']:g} images and {values['num_skipped_classes']:g} classes skipped."
    )
    parts = {"ap_": "AP:", "std_k": "Standard deviation over samples, by k:", "mean_level": "Mean over k, by level:"}
    named = {
        title: ", ".join(f"{key.removeprefix(prefix)} {100 * value:.1f}" for key, value in values.items() if key.startswith(prefix))
        for prefix, title in parts.items()
    }
    return "\n".join([f"Best level: {values['best_level']:g}. {counts}", *(f"{title} {text}." for title, text in named.items() if text)])


def score_all(
    levels: _ValuePairs, labels: NDArray[np.int8], test_labels: NDArray[np.int8], classes: Sequence[str], results: Results, *,
    costs: tuple[float, ...], folder: Path,
) -> dict[str, float]:  # fmt: skip
    """mAP and AP after fits to all of trainval, with a cost for each level and class by cross-validation.

    Args:
        levels: features [N, D] of trainval and [M, D] of test, level by level. labels: [N, C], test_labels: [M, C]: 1, -1 or 0 (difficult).
        folder: room for what workers share.
    Returns:
        "map_levelN"; "map" and "ap_CLASS" of the "best_level", that of the largest mAP.
    """
    keys = {
        (number, name, cost): f"folds {number} {name} {cost}" for number in range(1, len(levels) + 1) for name in classes for cost in costs
    }
    aps: dict[int, list[float]] = {}
    with progress("cross-validation", total=len(keys), unit="× 3 fits", done=results.count(keys.values())) as advance:
        for number, (train, test) in enumerate(levels, start=1):
            with Level.open(train, test, folder / f"basis-{number}") as level:
                columns = list(zip(classes, labels.T, test_labels.T, strict=True))
                folds = [
                    svm.CrossValidation(key=keys[number, name, cost], basis=level.basis, labels=trained, cost=cost)
                    for name, trained, _ in columns for cost in costs
                ]  # fmt: skip
                ahead = _like_the_first(costs, len(keys) / len(costs)) if not results.count(keys.values()) else (0,)
                results.run(svm.cross_validate, folds, level, advance, ahead=ahead, num_levels=len(levels))
                tests = []
                for name, trained, tested in columns:
                    cost = svm.best_cost(costs, [results[keys[number, name, cost]]["ap"] for cost in costs])
                    tests.append(
                        svm.Refit(key=f"test {number} {name} {cost}", basis=level.basis, labels=trained, test_labels=tested, cost=cost)
                    )
                results.run(svm.refit, tests, level, lambda: None)
            aps[number] = [results[task.key]["ap"] for task in tests]
            chosen = ", ".join(f"{name} {task.cost:.2g}" for name, task in zip(classes, tests, strict=True))
            log.info("level %d: mAP %.1f %%, at the costs %s", number, 100 * float(np.mean(aps[number])), chosen)
    best = max(aps, key=lambda number: float(np.mean(aps[number])))
    return {
        "map": float(np.mean(aps[best])),
        **{f"map_level{number}": float(np.mean(values)) for number, values in aps.items()},
        "best_level": best,
        **{f"ap_{name}": value for name, value in zip(classes, aps[best], strict=True)},
    }


def _like_the_first(costs: Sequence[float], num_classes: float) -> Sequence[float]:
    """For how many fits those at the first costs stand, to judge the time: each of the large ones for itself, since they take long; fits
    at small costs take about half as long as that at the first, which is 1."""
    num_large = sum(cost > 1 for cost in costs)
    return [num_classes * (1 + (len(costs) - 1 - num_large) / 2), *[num_classes] * num_large]


def _home(work: Path | None, stack: ExitStack) -> Path:
    """Where features and results are kept, whatever the options; locked, and without what killed runs left."""
    if work is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orl-fast-voc07-")))
    home = work.parent / "voc07"
    stack.enter_context(locked(home, what="orl-fast eval voc07"))
    remove_leftovers(home)
    for left in home.glob("basis-*"):
        shutil.rmtree(left, ignore_errors=True)
    return home


def _scorable(
    splits: Sequence[Split], parts: Sequence[Levels], classes: tuple[str, ...]
) -> tuple[NDArray[np.int8], NDArray[np.int8], tuple[str, ...]]:
    """Labels of the images that could be read, without the classes that cannot be learned or tested. DataError if none is left."""
    train, test = (split.labels[part.kept] for split, part in zip(splits, parts, strict=True))
    usable, reasons = [], []
    for index, name in enumerate(classes):
        positives, negatives = int(np.sum(train[:, index] > 0)), int(np.sum(train[:, index] <= 0))
        tested, absent = int(np.sum(test[:, index] > 0)), int(np.sum(test[:, index] < 0))
        if min(positives, negatives) < svm.NUM_FOLDS:
            reasons.append(f"{name} (trainval has it in {positives} images and lacks it in {negatives}; {svm.NUM_FOLDS} are needed)")
        elif not tested or not absent:
            reasons.append(f"{name} (test has it in {tested} images and lacks it in {absent}; 1 is needed)")
        else:
            usable.append(index)
    if not usable:
        raise DataError(f"none of the {len(classes)} classes can be scored: {'; '.join(reasons[:3])}; give more of the data set")
    if reasons:
        log.warning("%d classes cannot be scored and are not in the mean: %s", len(reasons), "; ".join(reasons))
    return train[:, usable], test[:, usable], tuple(classes[i] for i in usable)
