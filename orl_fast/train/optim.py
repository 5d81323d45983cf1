"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

import math

import torch

from orl_fast.config import Config

_WARMUP_RATIO = 1e-4  # of the scheduled lr, at step 0


def learning_rate(step: int, config: Config, *, steps_per_epoch: int) -> float:
    """Cosine decay to 0 with linear warm-up (ORL, appendix A); the peak is proportional to the global batch.

    The warm-up rises in every step and multiplies the cosine's lr. Where it is longer than the run, the run ends within it. The cosine is
    constant within an epoch, as the reference implementation has it, or falls in every step (`optim.cosine`).

    Args:
        step: 0-based, below epochs * steps_per_epoch.
    """
    optim = config.optim
    per_epoch = optim.cosine == "epoch" or (optim.cosine == "auto" and config.variant == "official")
    done = step // steps_per_epoch if per_epoch else step / steps_per_epoch
    lr = 0.5 * peak_learning_rate(config) * (1 + math.cos(math.pi * done / config.train.epochs))
    warmup_steps = optim.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        lr *= 1 - (1 - step / warmup_steps) * (1 - _WARMUP_RATIO)
    return lr


def peak_learning_rate(config: Config) -> float:
    """lr_per_256 * global batch / 256."""
    return config.optim.lr_per_256 * config.train.batch_size / 256


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For all parameter groups, times their "lr_scale" where they have one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
