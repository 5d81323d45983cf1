"""What a method trains and what comes out of it: a backbone with a projector, and the slowly moving average of one."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from orl_fast.models.backbone import build_backbone
from orl_fast.models.heads import Mlp, pool


class Network(nn.Module):
    """Backbone, global average pool and projector: images [B, 3, H, W], normalized floats → projections [B, D].

    `backbone`: see `build_backbone`; `widths`, `last_bias` and `last_norm`: of the projector behind the pooled features, see `Mlp`.
    """

    def __init__(self, backbone: str, widths: Sequence[int], *, last_bias: bool = False, last_norm: bool = False) -> None:
        super().__init__()
        self.name = backbone
        self.backbone = build_backbone(backbone)
        self.projector = Mlp((self.backbone.num_features, *widths), last_bias=last_bias, last_norm=last_norm)

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.projector(pool(self.backbone(images)))
        return projections

    @property
    def description(self) -> dict[str, Any]:
        """Plain values from which `from_description` builds it again, with other weights."""
        return {"backbone": self.name, "projector": self.projector.settings}

    @classmethod
    def from_description(cls, values: Mapping[str, Any]) -> Self:
        _, *widths = values["projector"]["widths"]
        return cls(values["backbone"], widths, last_bias=values["projector"]["last_bias"], last_norm=values["projector"]["last_norm"])


def project(network: Network, views: Sequence[Tensor], *, joined: bool = False) -> list[Tensor]:
    """Projections [B, D] of views of one size, [B, 3, S, S] each, normalized floats.

    `joined`: all views concatenated in one forward pass, so with common batch statistics. Faster, but not what the papers do.
    """
    if joined and views:
        return list(network(torch.cat(list(views))).chunk(len(views)))
    return [network(view) for view in views]


def frozen_copy(online: Network) -> Network:
    """The target network to begin with: the same weights, never reached by a gradient."""
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """target ← momentum * target + (1 - momentum) * online, for all parameters in a few kernel launches (BYOL, section 3.1).

    Buffers are left alone: the target's batch norm statistics come from its own forward passes in training mode.
    """
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


def ema_momentum(step: int, *, num_steps: int, base: float) -> float:
    """Momentum of the target network after the optimizer's step number `step`, 0-based: from `base` up to 1 (BYOL, section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2
