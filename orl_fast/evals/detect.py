"""Object detection and instance segmentation on COCO: fine-tune Mask R-CNN, report average precision.

DATA is a COCO folder: annotations/instances_train*.json and instances_val*.json, and a folder of images named like each. The backbone,
a ResNet, gets a feature pyramid and heads with synchronized batch norm, and all of it is trained; the defaults are the 1x schedule.
Detections (results.json) and what they are scored against (ground-truth.json) are kept in evals/detect-…, in CHECKPOINT's folder. A
killed evaluation resumes with the same command. It runs on several GPUs under torchrun.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orl_fast.config import Section
from orl_fast.console import log
from orl_fast.distributed import Ranks, broadcast_value, gather_values
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.evals import Context
from orl_fast.evals.detection_data import (
    DetectionData,
    batches_of_steps,
    open_detection_data,
    training_examples,
)
from orl_fast.evals.detection_inference import detect, to_device
from orl_fast.evals.detection_model import Detector, build_detector, parameter_groups, pyramid_levels
from orl_fast.evals.detection_score import average_precision
from orl_fast.evals.labels import images_beside
from orl_fast.evals.training import Condition, Training
from orl_fast.files import atomic_file, write_json
from orl_fast.models import Encoder
from orl_fast.models.sync_bn import synchronize_batch_norm

DISTRIBUTED = True
_HEADINGS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
SCORES = {f"{kind}_{key}": f"{kind} {heading}" for kind in ("box", "mask") for key, heading in _HEADINGS.items()}
_LR, _LR_BATCH = 0.02, 16
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4
_WARMUP_STEPS, _WARMUP_FACTOR = 1000, 1e-3
_MIN_SIZE_PX = 64  # of which the deepest map has 2 × 2 pixels: batch norm needs more than one
_SIZE_STEP_PX = 32


class Options(Section):
    """Entries and images that cannot be used are skipped, counted and named. For a trial, use a short schedule, small images and narrow
    heads: --schedule 200 --batch-size 2 --train-sizes 160 --test-size 160 --width 64 --rois-per-image 64."""

    schedule: int = Field(default=90_000, ge=1, description="Iterations; the lr falls to a tenth after 2/3 and after 8/9 of them.")
    batch_size: int = Field(default=_LR_BATCH, ge=1, description="Images per iteration, over all ranks.")
    lr: float | None = Field(default=None, gt=0, description="Learning rate [default: 0.02 × batch size / 16].")
    warmup: int | None = Field(default=None, ge=0, description="Iterations of linear warm-up [default: 1000, or a fifth].")
    train_sizes: str = Field(default="640-800", description="Shorter sides in training, in pixels: a range in steps of 32, or a list.")
    test_size: int = Field(default=800, ge=_MIN_SIZE_PX, description="Shorter side in testing, in pixels.")
    max_size: int = Field(default=1333, ge=_MIN_SIZE_PX, description="Longest side, in pixels.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="Of convolutions; boxes are computed in fp32.")
    masks: bool = Field(default=True, description="Detect masks too, or boxes alone (Faster R-CNN).")
    width: int = Field(default=256, ge=1, description="Channels of pyramid and heads.")
    rois_per_image: int = Field(default=512, ge=4, description="RoIs per image that the heads are trained on.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of the heads' initialization and all random choices.")
    train_annotations: Path | None = Field(default=None, description="Annotation file to train on [default: DATA's].")
    train_images: Path | None = Field(default=None, description="Folder of its images [default: the one named like it].")
    val_annotations: Path | None = Field(default=None, description="Annotation file to test on [default: DATA's].")
    val_images: Path | None = Field(default=None, description="Folder of its images [default: the one named like it].")

    @field_validator("train_sizes")
    @classmethod
    def _check_sizes(cls, text: str) -> str:
        if min(parse_sizes(text)) < _MIN_SIZE_PX:
            raise ValueError(f"at least {_MIN_SIZE_PX} pixels are needed")
        return text


def parse_sizes(text: str) -> tuple[int, ...]:
    """The sizes that a text means: 640, 672, …, 800 for 640-800; 160 and 192 for 160,192. ValueError for anything else."""
    try:
        if "-" in text:
            first, last = map(int, text.split("-"))
            sizes = tuple(range(first, last + 1, _SIZE_STEP_PX))
        else:
            sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes:
        raise ValueError("write a range like 640-800, or a list like 160,192")
    return sizes


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    """ConfigError: the backbone is no ResNet, or the batch cannot be divided among the ranks; DataError: see `open_data`."""
    ranks = context.ranks
    pyramid_levels(encoder.backbone, encoder.name)
    if options.batch_size % ranks.world_size:
        raise ConfigError(f"--batch-size {options.batch_size}: cannot be divided among {ranks.world_size} ranks; use a multiple of that")
    with nullcontext() if ranks.is_main else _errors_alone():  # every rank reads the same
        train, val = open_data(data, options, context)
    _check_same_data((train, val), context)
    torch.manual_seed(options.seed)
    detector = build_detector(
        encoder.trainable_backbone(), num_classes=len(train.categories), masks=train.masks is not None, width=options.width,
        rois_per_image=options.rois_per_image, name=encoder.name,
    ).to(context.device)  # fmt: skip
    synchronize_batch_norm(detector, ranks)
    optimizer = torch.optim.SGD(parameter_groups(detector, weight_decay=_WEIGHT_DECAY), lr=_LR, momentum=_MOMENTUM)
    # Images are grouped by their orientation within each rank's share of a batch.
    parts: dict[str, Any] = {"model": detector, "optimizer": optimizer, "ranks": Condition("ranks:", str(ranks.world_size))}
    with Training.open(parts, num_steps=options.schedule, context=context) as training:
        _announce(encoder, train, val, options, ranks)
        _train(detector, optimizer, train, options, context, training)
        values = _test(detector.eval(), train, val, options, context)
    return {
        **values,
        "iterations": options.schedule,
        "batch_size": options.batch_size,
        "num_train_images": len(train.paths),
        "num_train_objects": len(train.images),
        "num_classes": len(train.categories),
        "num_skipped_train_images": train.num_skipped_images,
        "num_skipped_train_objects": train.num_skipped_objects,
    }


def summary(values: dict[str, float]) -> str:
    def by_area(kind: str) -> str:
        shares = [values.get(f"{kind}_ap_{size}") for size in ("small", "medium", "large")]
        return f"{kind} " + " / ".join("–" if share is None else f"{100 * share:.1f}" for share in shares)

    def counts(part: str) -> str:
        skipped = f"{values[f'num_skipped_{part}_images']:g} images and {values[f'num_skipped_{part}_objects']:g} objects skipped"
        return f"{values[f'num_{part}_images']:g} images with {values[f'num_{part}_objects']:g} objects ({skipped})"

    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in values]
    return (
        f"AP of small / medium / large objects: {', '.join(map(by_area, kinds))} %. {values['iterations']:g} iterations of "
        f"{values['batch_size']:g} images; trained on {counts('train')}, tested on {counts('test')}, {values['num_classes']:g} classes."
    )


def open_data(data: Path, options: Options, context: Context) -> tuple[DetectionData, DetectionData]:
    """What to train on (see `for_training`) and to test on, both with masks or both without.

    DataError as `open_detection_data` raises it; or there is not one annotation file for each; or the test part has categories that the
    training part lacks, or some of its images.
    """
    masks = options.masks
    parts = []
    for part in ("train", "val"):
        file, folder = _part(data, part, getattr(options, f"{part}_annotations"), getattr(options, f"{part}_images"))
        parts.append(open_detection_data(file, folder, masks=masks, context=context))
    train, val = parts[0].for_training(), parts[1]
    if not len(train.images):
        raise DataError(f"{train.annotations}: all of its objects are crowds, so there is nothing to train on; give another file")
    if val.crowds.all():
        raise DataError(f"{val.annotations}: all of its objects are crowds, so there is nothing to find; give another file")
    if masks and (train.masks is None or val.masks is None):
        log.warning("boxes alone are detected, since there are no masks to train on or to test on")
    if train.masks is None or val.masks is None:
        train, val = train.without_masks(), val.without_masks()
    _check_parts(train, val)
    return train, val


def learning_rate(step: int, *, peak: float, num_steps: int, num_warmup: int) -> float:
    """Of a 0-based iteration: linear warm-up from a thousandth, a tenth after 2/3, a hundredth after 8/9 (Detectron2's 1x schedule)."""
    lr = peak * math.prod(0.1 for milestone in milestones(num_steps) if step >= milestone)
    if step < num_warmup:
        done = step / num_warmup
        lr *= _WARMUP_FACTOR * (1 - done) + done
    return lr


def milestones(num_steps: int) -> tuple[int, int]:
    return num_steps * 2 // 3, num_steps * 8 // 9


def _train(
    detector: Detector, optimizer: torch.optim.Optimizer, train: DetectionData, options: Options, context: Context, training: Training
) -> None:
    ranks, device = context.ranks, context.device
    if training.first_step == options.schedule:
        log.info("the detector is trained already")
        return
    per_rank = options.batch_size // ranks.world_size
    batches = batches_of_steps(
        train, num_steps=options.schedule, batch_size=options.batch_size, world_size=ranks.world_size, seed=options.seed
    )
    examples = training_examples(
        train, batches, first_step=training.first_step, sizes_px=parse_sizes(options.train_sizes), max_px=options.max_size,
        seed=options.seed, context=context,
    )  # fmt: skip
    model: nn.Module = detector
    if ranks.world_size > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name for broadcast_buffers, which older torch does not know
            model = DistributedDataParallel(detector, broadcast_buffers=False, gradient_as_bucket_view=True)
    peak, num_warmup = _peak_lr(options), _num_warmup(options)

    def step(number: int) -> Mapping[str, Tensor]:
        batch = [to_device(example, device) for example in next(examples)]
        lr = learning_rate(number, peak=peak, num_steps=options.schedule, num_warmup=num_warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Keyed by the step and the place in the global batch, like all randomness here.
        first = (options.seed << 32) + number * options.batch_size + ranks.rank * per_rank
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                losses: dict[str, Tensor] = model(batch, range(first, first + len(batch)))
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"iteration {number}: {len(batch)} images a step do not fit into the GPU's memory; use more GPUs, --precision bf16, or a "
                "smaller --batch-size (the lr follows) with a longer --schedule"
            ) from error
        if not torch.isfinite(loss):
            shown = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise DataError(
                f"iteration {number}: the loss is not finite ({shown}), so training stops; use a lower --lr than {peak:g}, or a longer "
                f"--warmup than {num_warmup}"
            )
        optimizer.step()
        return {"loss": loss, **losses}

    training.run(step, what="training", images_per_step=options.batch_size)


def _test(detector: Detector, train: DetectionData, val: DetectionData, options: Options, context: Context) -> dict[str, float]:
    """Detect in all images, each on one rank, and score; files are written by the first rank. The same values on every rank."""
    ids = dict(zip(val.categories, val.category_ids, strict=True))
    bf16, sizes = options.precision == "bf16", {"short_px": options.test_size, "max_px": options.max_size}
    own = detect(detector, val, category_ids=[ids.get(name) for name in train.categories], bf16=bf16, **sizes, context=context)
    gathered = gather_values(own, context.ranks)
    values: dict[str, float] = {}
    if context.ranks.is_main:
        unreadable = sorted(image for _, theirs in gathered for image in theirs)
        tested = val.of_images(np.setdiff1d(np.arange(len(val.paths)), unreadable))
        if tested.crowds.all():
            raise DataError(f"{val.annotations}: no image that has objects can be decoded; give other test data")
        values = _score(tested, [entry for theirs, _ in gathered for entry in theirs], context)
        values |= {"num_skipped_test_images": val.num_skipped_images + len(unreadable), "num_skipped_test_objects": val.num_skipped_objects}
    return dict(broadcast_value(values, context.ranks))


def _score(val: DetectionData, found: list[dict[str, Any]], context: Context) -> dict[str, float]:
    """Average precision by name, and the counts."""
    order = {image: place for place, image in enumerate(val.image_ids.tolist())}
    found.sort(key=lambda entry: order[entry["image_id"]])
    ground_truth = val.as_coco()
    if context.work is not None:
        for name, content in (("ground-truth.json", ground_truth), ("results.json", found)):
            with atomic_file(context.work / name) as file:
                file.write(json.dumps(content).encode())
        log.info("%d detections in %s, scored against ground-truth.json next to it", len(found), context.work / "results.json")
    kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox"} if val.masks is None else {"box": "bbox", "mask": "segm"}
    values = {f"{name}_{key}": value for name, kind in kinds.items() for key, value in average_precision(ground_truth, found, kind).items()}
    return {**values, "num_test_images": len(val.paths), "num_test_objects": int((~val.crowds).sum()), "num_detections": len(found)}


def _announce(encoder: Encoder, train: DetectionData, val: DetectionData, options: Options, ranks: Ranks) -> None:
    if not ranks.is_main:
        return
    log.info(
        "%s on %s with a feature pyramid, batch norm over %d rank%s, nothing frozen; %s",
        "Faster R-CNN" if train.masks is None else "Mask R-CNN", encoder.name, ranks.world_size, "s"[: ranks.world_size - 1],
        options.precision,
    )  # fmt: skip
    log.info("training on %d images with %d objects of %d classes: %s", *_sizes(train), len(train.categories), train.annotations)
    log.info("testing on %d images with %d objects, %d crowds: %s", *_sizes(val), int(val.crowds.sum()), val.annotations)
    epochs = options.schedule * options.batch_size / len(train.paths)
    falls = " and ".join(f"{milestone:,}" for milestone in milestones(options.schedule))
    log.info(
        "%s iterations of %d images (%.1f epochs), lr %g%s, warm-up over %d, × 0.1 at %s; shorter sides %s px, in testing %d px",
        f"{options.schedule:,}", options.batch_size, epochs, _peak_lr(options),
        "" if options.lr or options.batch_size == _LR_BATCH else f" (= {_LR} × {options.batch_size} / {_LR_BATCH})", _num_warmup(options),
        falls, options.train_sizes, options.test_size,
    )  # fmt: skip


def _sizes(data: DetectionData) -> tuple[int, int]:
    return len(data.paths), int((~data.crowds).sum())


def _peak_lr(options: Options) -> float:
    return options.lr or _LR * options.batch_size / _LR_BATCH


def _num_warmup(options: Options) -> int:
    return min(_WARMUP_STEPS, options.schedule // 5) if options.warmup is None else options.warmup


def _part(data: Path, part: str, annotations: Path | None, images: Path | None) -> tuple[Path, Path]:
    """Annotation file and image folder of "train" or "val"."""
    if annotations is None:
        found = sorted((data / "annotations").glob(f"instances_{part}*.json"))
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found) or "none"
            raise DataError(
                f"{data}: annotations/instances_{part}*.json has to be one file, found {names}; name it with --{part}-annotations FILE"
            )
        annotations = found[0]
    if not annotations.is_file():
        raise DataError(f"{annotations}: no such file; give a COCO-style annotation file")
    folder = images or images_beside(annotations)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name that of the images of {annotations.name} with --{part}-images")
    return annotations, folder


@contextmanager
def _errors_alone() -> Iterator[None]:
    level = log.level
    log.setLevel("ERROR")
    try:
        yield
    finally:
        log.setLevel(level)


def _check_parts(train: DetectionData, val: DetectionData) -> None:
    present = {val.categories[label] for label in val.labels.tolist()}
    if unknown := sorted(present - set(train.categories)):
        raise DataError(
            f"{val.annotations}: has categories that {train.annotations} lacks: {', '.join(unknown[:5])}; give files with the same ones"
        )
    if untrained := sorted(present - {train.categories[label] for label in train.labels.tolist()}):
        log.warning("%s: no object of %s to train on; their AP will be 0", train.annotations, ", ".join(untrained[:5]))
    shared = {path.resolve() for path in train.paths} & {path.resolve() for path in val.paths}
    if shared and train.annotations.resolve() == val.annotations.resolve():
        log.warning("%s: training and testing on the same images; the AP says nothing about others", train.annotations)
    elif shared:
        raise DataError(f"{min(shared)}: {len(shared)} images are in the training data and in the test data; give other test data")


def _check_same_data(parts: tuple[DetectionData, DetectionData], context: Context) -> None:
    """StaleError if what was begun in the work folder was begun with other annotations: a resumed training would mix both."""
    if context.work is None or not context.ranks.is_main:
        return
    digests = {}
    for part, data in zip(("train", "val"), parts, strict=True):
        with data.annotations.open("rb") as file:
            digests[part] = hashlib.file_digest(file, "sha256").hexdigest()
    digests["images"] = hashlib.sha256("\n".join(str(path) for data in parts for path in data.paths).encode()).hexdigest()
    path = context.work / "data.json"
    if path.exists() and json.loads(path.read_bytes()) != digests:
        raise StaleError(f"{context.work}: was begun with other annotations or images; remove it to start over, or choose another --out")
    write_json(path, digests)
