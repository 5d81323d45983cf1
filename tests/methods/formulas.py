"""BYOL's loss written out in float64 numpy from the outputs of copied layers, and methods whose two networks differ."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from orl_fast.config import Config
from orl_fast.methods import METHODS, Method
from orl_fast.models import Network
from orl_fast.views.normalize import normalize


def unlike_at_the_start(method: str, config: Config) -> Method:
    """With the target moved off the online network, so that confusing the two shows."""
    torch.manual_seed(0)
    built = METHODS[method](config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith("target."):
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    return built


def symmetric_loss(online: Network, target: Network, head: nn.Module, first: Tensor, second: Tensor) -> float:
    """The sum over both directions of the mean squared distance of unit vectors."""
    online, target, head = copy.deepcopy(online), copy.deepcopy(target), copy.deepcopy(head)
    with torch.no_grad():
        views = [normalize(view, torch.float32) for view in (first, second)]
        predictions = [head(online(view)).double().numpy() for view in views]
        targets = [target(view).double().numpy() for view in views]
    total = 0.0
    for prediction, other in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        p = prediction / np.sqrt((prediction**2).sum(1, keepdims=True))
        z = other / np.sqrt((other**2).sum(1, keepdims=True))
        total += float(((p - z) ** 2).sum(1).mean())
    return total
