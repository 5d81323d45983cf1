"""Projectors and predictors: perceptrons with batch norm between their layers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from orl_fast.models.backbone import init_kaiming


class Mlp(nn.Sequential):
    """[B, widths[0]] → [B, widths[-1]]: Linear → BN → ReLU → … → Linear (BYOL's and ORL's heads: three widths; ORL, appendix A).

    `last_bias` and `last_norm`: whether the last layer has a bias, and a batch norm after it. `settings` builds the same again.
    """

    def __init__(self, widths: Sequence[int], *, last_bias: bool = False, last_norm: bool = False) -> None:
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(pairwise(widths)):
            last = i == len(widths) - 2
            layers.append(nn.Linear(width, following, bias=last_bias or not last))
            if not last or last_norm:
                layers.append(nn.BatchNorm1d(following))
            if not last:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        self.settings: dict[str, Any] = {"widths": list(widths), "last_bias": last_bias, "last_norm": last_norm}
        init_kaiming(self)


def pool(features: Tensor) -> Tensor:
    """Global average pool: [B, C, h, w] → [B, C]."""
    return features.mean(dim=(2, 3))
