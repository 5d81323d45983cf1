"""Linear classifiers on five feature levels of the frozen backbone (ImageNet, Places205, iNaturalist18).

Trained with SGD on random crops, all levels at once: learning rate 0.01 (× 0.1 three times), Nesterov momentum 0.9, weight decay
1e-4, batch 256; 28 epochs for ImageNet, 14 for Places205, 84 for iNaturalist18.
Runs under torchrun; interrupted, the same command resumes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from orl_fast.console import log
from orl_fast.evals import Context
from orl_fast.evals.labelled_shards import LabelledShards, open_labelled_shards
from orl_fast.evals.pooling import pool_levels
from orl_fast.evals.supervised import CROP_AND_FLIP, Schedule, TrainingOptions, fitting_batch, top_accuracies, train
from orl_fast.models import Encoder
from orl_fast.models.sync_bn import synchronize_batch_norm
from orl_fast.views.specs import Augmentation

DISTRIBUTED = True
SCORES = {"top1": "top-1", "top5": "top-5"}
_INIT_STD = 0.01
Dataset = Literal["imagenet", "places205", "inat18"]
_COLORS = Augmentation(jitter_prob=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0, grayscale_prob=0, blur_prob=0)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What differs between data sets."""

    schedule: Schedule
    augmentation: Augmentation = CROP_AND_FLIP
    lighting: bool = False


PROTOCOLS: dict[Dataset, Protocol] = {
    "imagenet": Protocol(schedule=Schedule(epochs=28, milestones=(8, 16, 24), gamma=0.1), augmentation=_COLORS, lighting=True),
    "places205": Protocol(schedule=Schedule(epochs=14, milestones=(4, 8, 12), gamma=0.1)),
    "inat18": Protocol(schedule=Schedule(epochs=84, milestones=(24, 48, 72), gamma=0.1)),
}


class Options(TrainingOptions):
    dataset: Dataset | None = Field(default=None, description="Whose schedule and augmentation [default: by class or file names].")
    epochs: int | None = Field(default=None, ge=1, description="Epochs; the milestones move with them [default: the data set's].")
    lr: float = Field(default=0.01, gt=0, description="Learning rate of the first epochs.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay.")


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    encoder.backbone.require_size(options.size_px, setting="side of the views (--size)")
    labelled = open_labelled_shards(data, options, context)
    protocol = PROTOCOLS[_dataset(labelled, options)]
    batch_size = fitting_batch(labelled.train, options.batch_size, context.ranks)
    heads = level_classifiers(encoder, num_classes=len(labelled.classes), size_px=options.size_px, seed=options.seed)
    synchronize_batch_norm(heads, context.ranks)
    optimizer = torch.optim.SGD(
        [{"params": list(heads.parameters()), "initial_lr": options.lr}],
        lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay,
    )  # fmt: skip
    schedule = protocol.schedule.scaled(options.epochs)
    train(
        heads, optimizer, schedule, labelled, options, context, batch_size=batch_size, augmentation=protocol.augmentation,
        lighting=protocol.lighting, prepare=encoder.levels, what="training linear classifiers",
    )  # fmt: skip
    heads.eval()
    shares, counted = top_accuracies(
        lambda images: heads(encoder.levels(images)), labelled.val, options, context, num_outputs=len(heads.linears),
        num_classes=len(labelled.classes),
    )  # fmt: skip
    best = int(shares[:, 0].argmax())
    levels = {f"top1_level{i}": float(top1) for i, top1 in enumerate(shares[:, 0], start=1)}
    return {
        "top1": float(shares[best, 0]), "top5": float(shares[best, 1]), "best_level": best + 1, **levels, "num_train": len(labelled.train),
        **counted, "num_classes": len(labelled.classes), "num_skipped": labelled.num_skipped, "epochs": schedule.epochs,
        "batch_size": batch_size,
    }  # fmt: skip


def summary(values: dict[str, float]) -> str:
    names = sorted(key for key in values if key.startswith("top1_level"))
    levels = ", ".join(f"{100 * values[key]:.1f}" for key in names)
    return (
        f"Best of {len(names)} levels: {values['best_level']:g} (top-1 of all, shallow to deep: {levels} %). {values['num_train']:,.0f} "
        f"images trained on for {values['epochs']:g} epochs, {values['num_val']:,.0f} validated, {values['num_classes']:g} classes; "
        f"{values['num_skipped'] + values['num_undecodable']:,.0f} images skipped."
    )


def _dataset(labelled: LabelledShards, options: Options) -> Dataset:
    for dataset in PROTOCOLS:
        if dataset in (options.dataset, labelled.dataset if options.dataset is None else None):
            epochs = PROTOCOLS[dataset].schedule.epochs
            log.info("protocol of %s (%d epochs)%s", dataset, epochs, "" if options.dataset else ", by names; --dataset chooses another")
            return dataset
    log.warning("no known data set by its names: protocol of imagenet (28 epochs, color changes); --dataset chooses another")
    return "imagenet"


class LevelClassifiers(nn.Module):
    """Feature maps of L levels → L logits [B, num_classes]: each map normalized by channel without affine parameters, pooled, classified.

    The normalization comes before the pooling, as in OpenSelfSup's MultiClsHead, with which the published numbers were made. Over several
    ranks it takes all ranks' statistics. Weights are normal with std 0.01, biases 0; maps get no gradient.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(num, affine=False) for num in channels)
        self.linears = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)
        for linear in self.linears:
            nn.init.normal_(linear.weight, std=_INIT_STD)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(levels[0].device.type, enabled=False):
            with torch.no_grad():
                wide = [level if level.dtype == torch.float64 else level.float() for level in levels]
                pooled = [pool_levels([norm(level)])[0] for norm, level in zip(self.norms, wide, strict=True)]  # one large map at a time
            return [linear(features) for linear, features in zip(self.linears, pooled, strict=True)]


def level_classifiers(encoder: Encoder, *, num_classes: int, size_px: int, seed: int) -> LevelClassifiers:
    """New classifiers for an encoder's levels, on its device; the seed decides the weights."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        levels = encoder.levels(torch.zeros(1, 3, size_px, size_px, device=device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = LevelClassifiers([level.shape[1] for level in levels], [part.shape[1] for part in pool_levels(levels)], num_classes)
    return heads.to(device)
