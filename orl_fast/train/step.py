"""One optimizer step of a method: everything that runs on the device between two batches."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orl_fast.config import Config
from orl_fast.errors import ConfigError, DataError
from orl_fast.methods import METHODS
from orl_fast.models import Branch
from orl_fast.train.distributed import Ranks, synchronize_batch_norm
from orl_fast.train.metrics import Meter
from orl_fast.train.optim import build_optimizer, set_learning_rate
from orl_fast.views.loader import Views


class TrainStep:
    """A method with its optimizer, set up for this rank's device: memory format, precision, batch norm and gradients over ranks.

    Attributes:
        method: the module whose state a checkpoint holds. optimizer: its optimizer.
        micro_batch: images per rank and forward pass.
    Raises:
        ConfigError: the global batch cannot be shared among ranks and micro-batches.
    """

    def __init__(self, method: str, config: Config, *, ranks: Ranks) -> None:
        self.micro_batch = micro_batch(config, ranks)
        self._config, self._ranks = config, ranks
        self._dtype = _autocast_dtype(config, ranks.device)
        if ranks.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # sizes never change
        torch.manual_seed(config.train.seed)
        self.method = METHODS[method](config).to(ranks.device)
        if config.train.channels_last:
            self.method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.train.sync_bn:
            synchronize_batch_norm(self.method, ranks)
        self.optimizer = build_optimizer(self.method.parameters(), config)
        self._model: nn.Module = self.method

    def connect(self) -> None:
        """Compile, and join the ranks; after the weights have been restored, since ranks take those of the first."""
        if self._config.train.compile:
            for child in self.method.children():
                if isinstance(child, Branch):
                    child.compile(dynamic=False)  # a program for each view size
        if self._ranks.world_size > 1:
            # Batch norm buffers stay with their rank: with synchronized statistics they are equal anyway.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a new name for broadcast_buffers, which older torch does not know
                self._model = DistributedDataParallel(self.method, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, batches: Iterator[Views], *, step: int, rate: float, momentum: float, meter: Meter) -> None:
        """Run step number `step` (0-based) on the next micro-batches; nothing here waits for the device."""
        config = self._config.train
        # Keyed by the step, like all randomness: models with dropout resume exactly, too.
        torch.manual_seed((config.seed << 32) + step * self._ranks.world_size + self._ranks.rank)
        set_learning_rate(self.optimizer, rate)
        for micro in range(config.accumulate):
            views = next(batches)
            if len(views.rows) < 2:
                raise DataError(f"step {step}: {len(views.rows)} of {self.micro_batch} images could be decoded; run orl-fast verify")
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last or self._model is self.method else self._model.no_sync():  # type: ignore[operator]
                with torch.autocast(self._ranks.device.type, self._dtype, enabled=self._dtype is not None):
                    losses = self._model(views)
                (losses["loss"] / config.accumulate).backward()
            meter.add(losses, num_images=len(views.rows), num_skipped=views.num_skipped)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(momentum=momentum)


def micro_batch(config: Config, ranks: Ranks) -> int:
    """Images per rank and forward pass.

    Raises:
        ConfigError: the global batch cannot be shared evenly, or leaves fewer than the two images that batch norm needs.
    """
    total, parts = config.train.batch_size, ranks.world_size * config.train.accumulate
    how = f"{ranks.world_size} ranks × {config.train.accumulate} micro-batches"
    if total % parts:
        raise ConfigError(f"train.batch_size = {total}: not a multiple of {how}; use a multiple of {parts}")
    if total < 2 * parts:
        raise ConfigError(f"train.batch_size = {total}: batch norm needs two images in each of {how}; use {2 * parts} or more")
    return total // parts


def _autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """bfloat16 where asked for, or where "auto" finds a GPU that computes in it; None: float32."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if config.train.precision == "bf16" else None
