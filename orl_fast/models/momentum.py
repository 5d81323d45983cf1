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


class MomentumEncoder(nn.Module):
    """Online branch, learnt by gradient, and target branch, the exponential moving average of its parameters (BYOL, section 3.1).

    The target's batch norm buffers are not averaged: they come from its own forward passes in training mode.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.online = Branch(config)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def encode(self, views: Sequence[Tensor], *, joined: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Project views of one size by both branches; no gradient flows through the target.

        Args:
            views: V tensors [B, 3, S, S], normalized floats.
            joined: all views in one forward pass, hence with common batch statistics. Faster, but not what the paper does.
        Returns:
            V online and V target projections, [B, D] each.
        """
        batches = [torch.cat(list(views))] if joined else list(views)
        online = [self.online(batch) for batch in batches]
        with torch.no_grad():
            target = [self.target(batch) for batch in batches]
        if joined:
            return list(online[0].chunk(len(views))), list(target[0].chunk(len(views)))
        return online, target

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target ← momentum * target + (1 - momentum) * online, for all parameters in a few kernel launches."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - momentum)
