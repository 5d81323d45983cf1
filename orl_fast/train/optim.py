"""The optimizer: SGD over all parameters in one fused kernel."""

from collections.abc import Iterable

import torch
from torch import nn

from orl_fast.config import Config


def build_optimizer(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.SGD:
    """SGD with momentum; weight decay falls on batch norm and biases too (ORL, appendix A). Its rate is set in every step."""
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.SGD(
        learnt,
        lr=0.0,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def base_learning_rate(config: Config) -> float:
    """The peak rate: proportional to the global batch."""
    return config.optim.lr_per_256 * config.train.batch_size / 256
