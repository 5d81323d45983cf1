"""The online branch and its slowly moving average, the target branch."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orl_fast.config import ModelConfig
from orl_fast.models.backbone import build_backbone
from orl_fast.models.heads import pool, projector


class Branch(nn.Module):
    """Backbone, global average pool and projector: images [B, 3, H, W] → projections [B, projector_out]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone)
        self.projector = projector(self.backbone.num_features, hidden=config.projector_hidden, out=config.projector_out)

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.projector(pool(self.backbone(images)))
        return projections


def project(branch: Branch, views: Sequence[Tensor], *, joined: bool = False) -> list[Tensor]:
    """Projections [B, D] of views of one size, [B, 3, S, S] each, normalized floats.

    Args:
        joined: all views in one forward pass, hence with common batch statistics. Faster, but not what the paper does.
    """
    if joined and views:
        return list(branch(torch.cat(list(views))).chunk(len(views)))
    return [branch(view) for view in views]


def frozen_copy(online: Branch) -> Branch:
    """The target branch to begin with: the same weights, never reached by a gradient."""
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """target ← momentum * target + (1 - momentum) * online, for all parameters in a few kernel launches (BYOL, section 3.1).

    Buffers are left alone: the target's batch norm statistics come from its own forward passes in training mode.
    """
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)
