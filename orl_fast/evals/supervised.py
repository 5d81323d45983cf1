"""What evaluations that train on labelled images have in common: schedule, batches, the step over ranks, and the accuracy."""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orl_fast.config import LoaderConfig
from orl_fast.console import log, progress
from orl_fast.distributed import Ranks, sum_over_ranks
from orl_fast.encode import bounded, encode
from orl_fast.errors import ConfigError, DataError
from orl_fast.evals import Context
from orl_fast.evals.labelled_shards import LabelledShards, LabelledShardsOptions, Part
from orl_fast.evals.training import Condition, Training
from orl_fast.views import chance
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.loader import ViewLoader
from orl_fast.views.normalize import STD, normalize
from orl_fast.views.plan import Batch, ViewPlan, center_crops
from orl_fast.views.specs import Augmentation, RandomCrop, ViewSpec

RESIZE_PX, CROP_PX = 256, 224  # of the protocol; other sides keep the ratio
TOP = 5
CROP_AND_FLIP = Augmentation(jitter_prob=0, grayscale_prob=0, blur_prob=0)
_LIGHTING_STD = 0.1
# Principal components of ImageNet's RGB values in 0 … 1 (Krizhevsky et al., 2012): variances, and one direction per column.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_VAL_BATCH = 128


class TrainingOptions(LabelledShardsOptions):
    batch_size: int = Field(default=256, ge=2, description="Images per step, over all ranks.")
    size_px: int = Field(default=CROP_PX, ge=8, le=2048, description="Side of the views in pixels.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="Of the backbone in training; bf16 is faster on a GPU.")
    renderer: Literal["cpu", "gpu", "reference"] = Field(default="cpu", description="Renderer of the views.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the order of images, of views and of initial weights.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate that is multiplied by `gamma` at milestones, in epochs of a run of `epochs`."""

    epochs: int
    milestones: tuple[float, ...]
    gamma: float

    def scaled(self, epochs: int | None) -> "Schedule":
        """The same for another number of epochs, the milestones at the same shares of it."""
        if epochs is None or epochs == self.epochs:
            return self
        milestones = tuple(milestone * epochs / self.epochs for milestone in self.milestones)
        shown = ", ".join(f"{milestone:.3g}" for milestone in milestones)
        log.info("%d epochs in place of %d: the learning rate falls after %s epochs", epochs, self.epochs, shown)
        return Schedule(epochs=epochs, milestones=milestones, gamma=self.gamma)

    def factor(self, step: int, *, steps_per_epoch: int) -> float:
        """Of the learning rate at a step, from 0."""
        return self.gamma ** bisect_right(self.milestones, step / steps_per_epoch)


def fitting_batch(part: Part, wanted: int, ranks: Ranks) -> int:
    """The batch size: as wanted or, of fewer images, the largest power of two. ConfigError if the ranks cannot share it evenly."""
    size = wanted
    if len(part) < wanted:
        size = 1 << (len(part).bit_length() - 1)
        log.warning("%d training images are fewer than a batch of %d: batches of %d (--batch-size)", len(part), wanted, size)
    if size % ranks.world_size or size < 2 * ranks.world_size:
        raise ConfigError(
            f"batch of {size} images: {ranks.world_size} ranks cannot share it evenly, with two images or more each; use a "
            "--batch-size that is a multiple of the ranks, or fewer ranks"
        )
    return size


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, labelled: LabelledShards, options: TrainingOptions,
    context: Context, *, batch_size: int, augmentation: Augmentation, lighting: bool = False, what: str,
    prepare: Callable[[Tensor], Any] = lambda images: images,
) -> None:  # fmt: skip
    """Train `model` with cross-entropy, the sum over what it returns: logits [B, C] or several; or resume that, and leave it trained.

    Groups of the optimizer have their learning rate at the start as "initial_lr". Each step's gradient is that of the mean over the global
    batch, whatever the ranks hold of it.

    Args:
        model: called with what `prepare` makes, without gradients, of normalized float images [B, 3, S, S].
        lighting: shift colors along ImageNet's principal components (std 0.1).
    Raises:
        DataError: see `Training`; or almost all images of a batch cannot be decoded.
    """
    ranks, device, train_part = context.ranks, context.device, labelled.train
    steps_per_epoch = len(train_part) // batch_size
    labels = torch.from_numpy(train_part.labels)
    spec = ViewSpec(name="view", size_px=options.size_px, source=RandomCrop(), augmentation=augmentation, stream=1)
    # The weights are drawn on every rank from one seed, and a resumed training is loaded over them.
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "images": Condition("images and batches", f"{labelled.fingerprint}-{batch_size}"),
    }
    num_steps = schedule.epochs * steps_per_epoch
    with Training.open(parts, num_steps=num_steps, context=context) as training:
        if training.first_step >= num_steps:
            return
        wrapped: nn.Module = model
        if ranks.world_size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a new name for broadcast_buffers, which older torch does not know
                wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        model.train()
        loader = ViewLoader.open(
            train_part.index, [spec], batch_size=batch_size, seed=options.seed, rows=train_part.rows,
            loader=LoaderConfig(renderer=options.renderer), rank=ranks.rank, world_size=ranks.world_size, device=device,
            num_threads=context.num_threads, start_step=training.first_step, num_steps=num_steps - training.first_step,
        )  # fmt: skip

        def step(number: int) -> Mapping[str, Tensor]:
            batch = next(loader)
            torch.manual_seed((options.seed << 32) + number * ranks.world_size + ranks.rank)  # for backbones with dropout
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule.factor(number, steps_per_epoch=steps_per_epoch)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                epoch = loader.sampler.epoch_of(number)
                with torch.no_grad():
                    inputs = prepare(_images(batch, device, lighting=(options.seed, epoch) if lighting else None))
                outputs = wrapped(inputs)
            losses, num_images = _losses(outputs, labels[torch.from_numpy(batch.rows)].to(device), ranks)
            if loader.num_skipped and int(num_images) < 2:  # waits for the device only where images were skipped
                raise DataError(f"step {number}: {int(num_images)} of {batch_size} images could be decoded; run orl-fast verify")
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return {"loss": losses.detach().mean()}

        with closing(loader):
            training.run(step, what=what, images_per_step=batch_size)
            if loader.num_skipped:
                log.warning("%s: %d times an image could not be decoded and was left out of its batch", what, loader.num_skipped)


def _images(batch: Batch, device: torch.device, *, lighting: tuple[int, int] | None) -> Tensor:
    """[B, 3, S, S] normalized, in the memory format that the renderer gives."""
    images = normalize(batch.views["view"].to(device, non_blocking=True))
    if lighting is None:
        return images
    shift = lighting_shifts(lighting[0], lighting[1], batch.rows) / np.array(STD)
    return images + torch.from_numpy(shift.astype(np.float32)).to(device, non_blocking=True)[:, :, None, None]


def lighting_shifts(seed: int, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """[B, 3]: what PCA lighting adds to red, green and blue in 0 … 1, before they are normalized (Krizhevsky et al., 2012)."""
    alphas = _LIGHTING_STD * chance.normals(seed, epoch, rows, chance.LIGHTING_STREAM, 3)
    return np.asarray((alphas * _EIGENVALUES) @ _EIGENVECTORS.T)


def _losses(outputs: Tensor | Sequence[Tensor], labels: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """[L] mean cross-entropies over the global batch, scaled so that the mean of the ranks' gradients is its gradient; and its images."""
    logits = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    losses = torch.stack(
        [F.cross_entropy(each.float() if each.dtype != torch.float64 else each, labels, reduction="sum") for each in logits]
    )
    num_images = torch.tensor(float(len(labels)), device=labels.device)
    if ranks.world_size > 1:
        num_images = sum_over_ranks(num_images)
    return losses * ranks.world_size / num_images, num_images


def _no_progress(_count: int) -> None:
    """Of ranks that show nothing."""


def top_accuracies(
    forward: Callable[[Tensor], Sequence[Tensor]], part: Part, options: TrainingOptions, context: Context, *, num_outputs: int,
    num_classes: int, what: str = "validating",
) -> tuple[NDArray[np.float64], dict[str, float]]:  # fmt: skip
    """Top-1 and top-5 accuracy, each image once over all ranks, resized to 256 and cropped to 224 at the center.

    Args:
        forward: normalized float images [B, 3, S, S] → logits [B, num_classes] of each of `num_outputs` classifiers.
    Returns:
        [num_outputs, 2] shares, and the numbers "num_val" and "num_undecodable".
    Raises:
        DataError: no image can be decoded, or values that are not finite.
    """
    ranks, index, top, skipped = context.ranks, part.index, min(TOP, num_classes), set[int]()
    start, stop = (rank * len(part) // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    rows = part.rows[start:stop]
    sizes: Any = {
        "heights": index.heights,
        "widths": index.widths,
        "resize_px": round(options.size_px * RESIZE_PX / CROP_PX),
        "crop_px": options.size_px,
    }
    loader = LoaderConfig(renderer=options.renderer)

    def best(images: Tensor) -> Tensor:
        """[B, num_outputs * top] the classes of the highest logits: whole numbers, which float32 holds."""
        logits = torch.stack(list(forward(images)), dim=1)
        return logits.topk(top).indices.float().where(logits.isfinite().all(2, keepdim=True), torch.nan).flatten(1)

    def skip(bad: NDArray[np.int64]) -> None:
        for row in set(bad.tolist()) - skipped:
            log.warning("image %s cannot be decoded: skipped", index.keys[row])
            skipped.add(row)

    def plans(cuts: Iterable[range]) -> Iterator[tuple[None, ViewPlan]]:
        for cut in cuts:
            yield None, center_crops(rows[cut.start : cut.stop], **sizes)

    num_bytes = 3 * index.heights[rows].astype(np.int64) * index.widths[rows]
    cuts = bounded(range(len(rows)), num_crops=np.ones(len(rows), np.int64), num_bytes=num_bytes, max_crops=_VAL_BATCH) if len(rows) else ()
    guesses = [np.empty((0, num_outputs * top), np.int32)]
    with (
        closing(open_source(index, loader)) as source,
        closing(open_renderer(options.renderer, source, loader, device=context.device, num_threads=context.num_threads)) as renderer,
        progress(what, total=len(rows), unit="images") if ranks.is_main else nullcontext(_no_progress) as advance,
    ):
        for _, batch in encode(best, renderer, plans(cuts), batch_size=_VAL_BATCH, device=context.device, skip=skip):
            guesses.append(batch.astype(np.int32))
            advance(len(batch))
    kept = rows[~np.isin(rows, list(skipped))]
    hits = np.concatenate(guesses).reshape(len(kept), num_outputs, top) == part.labels[kept][:, None, None]
    counts = np.concatenate([hits[:, :, 0].sum(0), hits.any(2).sum(0), [len(kept), len(skipped)]])
    totals = torch.from_numpy(counts.astype(np.float64)).to(context.device)
    if ranks.world_size > 1:
        totals = sum_over_ranks(totals)
    *correct, num_val, num_undecodable = totals.tolist()
    if not num_val:
        raise DataError(f"{index.path}: none of its {len(part)} validation images can be decoded; run orl-fast verify {index.path}")
    return np.array(correct).reshape(2, num_outputs).T / num_val, {"num_val": num_val, "num_undecodable": num_undecodable}
