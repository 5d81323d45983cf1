"""Semi-supervised classification: the whole network fine-tuned on the listed 1 % or 10 % of the training images.

DATA is labelled as for `eval linear`; FILE lists the images that keep their label, one file name per line, as SimCLR's 1percent.txt and
10percent.txt do. 20 epochs of SGD, batch 256, learning rates 0.01 (backbone) and 1.0 (head), × 0.2 after 12 and 16 epochs, batch norm
synchronized over ranks. Runs under torchrun; interrupted, the same command resumes it."""

import hashlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.labelled_shards import LabelledShards, Part, open_labelled_shards
from orl_fast.evals.layouts import MAX_MISSING, clean_name, is_image, read_lines, warn
from orl_fast.evals.supervised import CROP_AND_FLIP, Schedule, TrainingOptions, fitting_batch, top_accuracies, train
from orl_fast.models import Backbone, Encoder
from orl_fast.models.heads import pool
from orl_fast.models.sync_bn import synchronize_batch_norm

DISTRIBUTED = True
SCORES = {"top1": "top-1", "top5": "top-5"}
_INIT_STD = 0.01
_FEW = 0.05  # share of the training images up to which there is no weight decay: between the protocol's 1 % and 10 %
_WEIGHT_DECAY = 1e-4
_SCHEDULE = Schedule(epochs=20, milestones=(12, 16), gamma=0.2)


class Options(TrainingOptions):
    label_list: Path = Field(description="File names of the images that keep their label, one per line.")
    epochs: int = Field(default=20, ge=1, description="Epochs; the milestones move with them.")
    lr: float = Field(default=0.01, gt=0, description="Learning rate of the backbone in the first epochs.")
    head_lr: float = Field(default=1.0, gt=0, description="Learning rate of the head in the first epochs.")
    weight_decay: float | None = Field(default=None, ge=0, description="Weight decay [default: 0 for up to 5 % of the images, else 1e-4].")


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    encoder.backbone.require_size(options.size_px, setting="side of the views (--size)")
    everything = open_labelled_shards(data, options, context)
    labelled = listed_alone(everything, options.label_list)
    share, decay = len(labelled.train) / len(everything.train), options.weight_decay
    if decay is None:
        decay = 0.0 if share <= _FEW else _WEIGHT_DECAY
    log.info("%s of %s training images are listed (%.1f %%); weight decay %g", f"{len(labelled.train):,}", f"{len(everything.train):,}",
             100 * share, decay)  # fmt: skip
    batch_size = fitting_batch(labelled.train, options.batch_size, context.ranks)
    model = classifier(encoder, num_classes=len(labelled.classes), seed=options.seed)
    synchronize_batch_norm(model, context.ranks)
    trained = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        [{"params": trained, "initial_lr": options.lr}, {"params": list(model.head.parameters()), "initial_lr": options.head_lr}],
        lr=options.lr, momentum=0.9, weight_decay=decay,
    )  # fmt: skip
    schedule = _SCHEDULE.scaled(options.epochs)
    train(model, optimizer, schedule, labelled, options, context, batch_size=batch_size, augmentation=CROP_AND_FLIP, what="fine-tuning")
    model.eval()
    shares, counted = top_accuracies(
        lambda images: [model(images)], labelled.val, options, context, num_outputs=1, num_classes=len(labelled.classes)
    )
    return {
        "top1": float(shares[0, 0]), "top5": float(shares[0, 1]), "num_train": len(labelled.train), **counted,
        "num_classes": len(labelled.classes), "num_skipped": labelled.num_skipped, "epochs": schedule.epochs, "batch_size": batch_size,
        "weight_decay": decay,
    }  # fmt: skip


def summary(values: dict[str, float]) -> str:
    return (
        f"{values['num_train']:,.0f} images trained on for {values['epochs']:g} epochs, weight decay {values['weight_decay']:g}; "
        f"{values['num_val']:,.0f} validated, {values['num_classes']:g} classes; "
        f"{values['num_skipped'] + values['num_undecodable']:,.0f} images skipped."
    )


class Classifier(nn.Module):
    """Images [B, 3, S, S], normalized floats → logits [B, num_classes]: backbone, global average pool, one linear layer."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.normal_(self.head.weight, std=_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = pool(self.backbone(images))
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features if features.dtype == torch.float64 else features.float())
        return logits


def classifier(encoder: Encoder, *, num_classes: int, seed: int) -> Classifier:
    """A copy of the encoder's backbone with a new head, on its device; the seed decides the head's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(encoder.trainable_backbone(), num_classes)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the views are
    return model.to(next(encoder.parameters()).device)


def listed_alone(labelled: LabelledShards, path: Path) -> LabelledShards:
    """The data with the listed training images alone; classes stay.

    A line is a file name, with or without its folders; a label after it is ignored. DataError: more than a small share of the entries are
    not among the training images, or are so more than once, or fewer than two images are left.
    """
    index, entries, odd = labelled.train.index, dict[str, None](), list[str]()
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        name = next((name for name in (line, line.rpartition(" ")[0], line.rpartition(",")[0]) if is_image(name)), None)
        if name is None:
            odd.append(f"line {number}: {line[:80]!r}")
        else:
            entries[clean_name(name)] = None
    rows_of = defaultdict[str, list[int]](list)  # of the listed base names
    wanted = {entry.rpartition("/")[2] for entry in entries}
    for row in labelled.train.rows.tolist():
        if (base := index.file_names[row].rpartition("/")[2]) in wanted:
            rows_of[base].append(row)
    kept, missing, ambiguous = set[int](), list[str](), list[str]()
    for entry in entries:
        rows = rows_of.get(entry.rpartition("/")[2], [])
        rows = [
            row for row in rows if f"/{index.file_names[row]}".endswith(f"/{entry}") or f"/{entry}".endswith(f"/{index.file_names[row]}")
        ]
        if len(rows) == 1:
            kept.add(rows[0])
        else:
            (ambiguous if rows else missing).append(entry)
    if len(odd) + len(missing) + len(ambiguous) > MAX_MISSING * len(lines):
        example = [*missing, *ambiguous, *odd][0]
        raise DataError(
            f"{path}: of its {len(lines)} lines, {len(missing)} name no training image, {len(ambiguous)} several, {len(odd)} are no "
            f"file names, for example {example}; give the list of this data (file names as n01440764_10026.JPEG, or with the class folder)"
        )
    what = {"listed images that are not among the training images": missing, "names that several training images have": ambiguous}
    warn(path, what | {"lines that are no file names": odd, "lines that repeat an image": [""] * (len(lines) - len(odd) - len(entries))})
    if len(kept) < 2:
        raise DataError(f"{path}: lists {len(kept)} training images; at least 2 are needed")
    labels = np.full(len(index), -1, np.int64)
    rows_kept: NDArray[np.int64] = np.array(sorted(kept), np.int64)
    labels[rows_kept] = labelled.train.labels[rows_kept]
    if absent := len(labelled.classes) - len(np.unique(labels[rows_kept])):
        log.warning("%s: %d of %d classes have no listed image", path, absent, len(labelled.classes))
    mark = hashlib.sha256(labelled.fingerprint.encode() + labels.tobytes()).hexdigest()[:32]
    return replace(labelled, train=Part(index=index, labels=labels), fingerprint=mark)
