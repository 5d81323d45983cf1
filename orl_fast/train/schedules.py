"""Learning rate and target momentum as pure functions of the step: a resumed run needs no scheduler state."""

import math
from typing import Literal

_WARMUP_RATIO = 1e-4  # of the scheduled rate, at step 0


def learning_rate(
    step: int,
    *,
    base_lr: float,
    steps_per_epoch: int,
    num_epochs: int,
    warmup_epochs: float,
    cosine: Literal["epoch", "step"] = "epoch",
) -> float:
    """Cosine decay to 0 with linear warm-up (ORL, appendix A).

    The warm-up rises in every step and multiplies the cosine's rate. Where it is longer than the run, the run ends within it.

    Args:
        step: 0-based, in [0, num_epochs * steps_per_epoch).
        base_lr: already scaled by the batch: lr_per_256 * global batch / 256.
        cosine: "epoch": constant within an epoch, as the reference implementation has it; "step": falls in every step.
    """
    done = step // steps_per_epoch if cosine == "epoch" else step / steps_per_epoch
    rate = 0.5 * base_lr * (1 + math.cos(math.pi * done / num_epochs))
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - _WARMUP_RATIO)
    return rate


def ema_momentum(step: int, *, num_steps: int, base: float) -> float:
    """Momentum of the target network after the optimizer's step number `step`, 0-based: from `base` up to 1 (BYOL, section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2
