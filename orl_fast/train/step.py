"""One optimizer step of a method: everything that runs on the device between two batches, and its learning rate."""

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orl_fast.config import Config
from orl_fast.distributed import Ranks
from orl_fast.errors import ConfigError, DataError
from orl_fast.methods import METHODS
from orl_fast.models import Network
from orl_fast.models.sync_bn import synchronize_batch_norm
from orl_fast.train.metrics import Meter
from orl_fast.views.plan import Batch

_WARMUP_RATIO = 1e-4  # of the scheduled lr, at step 0


def learning_rate(step: int, config: Config, *, steps_per_epoch: int) -> float:
    """Cosine decay to 0 with linear warm-up (ORL, appendix A), a pure function of the 0-based step: a resumed run needs no scheduler state.

    The peak is proportional to the global batch. The warm-up rises in every step and multiplies the cosine's lr; a shorter run ends within
    it. The cosine is constant within an epoch, as the reference implementation has it, or falls in every step (`optim.cosine`).
    """
    optim = config.optim
    per_epoch = optim.cosine == "epoch" or (optim.cosine == "auto" and config.variant == "official")
    done = step // steps_per_epoch if per_epoch else step / steps_per_epoch
    peak = optim.lr_per_256 * config.train.batch_size / 256
    lr = 0.5 * peak * (1 + math.cos(math.pi * done / config.train.epochs))
    warmup_steps = optim.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        lr *= 1 - (1 - step / warmup_steps) * (1 - _WARMUP_RATIO)
    return lr


class TrainStep:
    """A method with its optimizer, set up for this rank's device: memory format, precision, batch norm and gradients over ranks.

    ConfigError if a micro-batch has fewer than the two images that batch norm needs, or the backbone takes no views of a size.
    """

    def __init__(self, method: str, config: Config, *, ranks: Ranks) -> None:
        parts = ranks.world_size * config.train.accumulate
        if config.train.batch_size < 2 * parts:
            how = f"{ranks.world_size} ranks × {config.train.accumulate} micro-batches"
            raise ConfigError(
                f"train.batch_size = {config.train.batch_size}: batch norm needs two images in each of {how}; use {2 * parts} or more"
            )
        self._config, self._ranks = config, ranks
        on_gpu, precision = ranks.device.type == "cuda", config.train.precision
        self._bf16 = precision == "bf16" or (precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False))
        if on_gpu:
            torch.backends.cudnn.benchmark = True  # sizes never change
        torch.manual_seed(config.train.seed)
        self.method = METHODS[method](config)  # the module whose state a checkpoint holds
        for size_px, name in {spec.size_px: spec.name for spec in self.method.views(config)}.items():
            self.method.online.backbone.require_size(size_px, setting=f"side of the view {name!r}")
        self.method.to(ranks.device)
        if config.train.channels_last:
            self.method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.train.sync_bn:
            synchronize_batch_norm(self.method, ranks)
        self.optimizer = self.method.optimizer()
        self._model: nn.Module = self.method

    def connect(self) -> None:
        """Compile, and join the ranks; after the weights have been restored, since ranks take those of the first."""
        if self._config.train.compile:
            for child in self.method.children():
                if isinstance(child, Network):
                    child.compile(dynamic=False)  # a program for each view size
        if self._ranks.world_size > 1:
            # Batch norm buffers stay with their rank: with synchronized statistics they are equal anyway.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a new name for broadcast_buffers, which older torch does not know
                self._model = DistributedDataParallel(self.method, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, batches: Iterator[Batch], *, step: int, num_steps: int, lr: float, meter: Meter) -> dict[str, float]:
        """Run step number `step` (0-based) on the next micro-batches, and return what the log should show; nothing waits for the device."""
        config = self._config.train
        # Keyed by the step, like all randomness: models with dropout resume exactly, too.
        torch.manual_seed((config.seed << 32) + step * self._ranks.world_size + self._ranks.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        self.method.before_step(step, num_steps)
        for micro in range(config.accumulate):
            batch = next(batches)
            num_images, num_skipped = len(batch.rows), len(batch.bad_rows)
            if num_images < 2:
                raise DataError(f"step {step}: {num_images} of {num_images + num_skipped} images could be decoded; run orl-fast verify")
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last or self._model is self.method else self._model.no_sync():  # type: ignore[operator]
                with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._bf16):
                    losses = self._model(batch.views)
                (losses["loss"] / config.accumulate).backward()
            meter.add(losses, num_images=num_images, num_skipped=num_skipped)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"lr": lr, **self.method.after_step(step, num_steps)}
