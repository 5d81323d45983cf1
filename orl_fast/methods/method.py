"""What the training loop asks of a method."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from orl_fast.config import Config
from orl_fast.models.momentum import Branch
from orl_fast.views.loader import Views
from orl_fast.views.normalize import normalize


class Method(nn.Module, ABC):
    """A self-supervised method. `online` is what it trains: its backbone and projector go to mining, evaluations and export.

    Attributes:
        needs_pairs: views are drawn from mined RoIs and pairs too.
    """

    needs_pairs: ClassVar[bool] = False
    online: Branch

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def loss(self, views: Views) -> dict[str, Tensor]:
        """Scalars by name: "loss", to be minimized, and the terms that it consists of, detached and unweighted."""

    def forward(self, views: Views) -> dict[str, Tensor]:
        # Distributed data parallel hooks into forward, so that all of a step's passes are one call.
        return self.loss(views)

    def after_step(self, *, momentum: float) -> None:
        """Called after the optimizer's step with the target momentum of this step."""


def normalized(view: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] → normalized floats, on the same device, in the precision that the forward pass computes in."""
    device = view.device.type
    return normalize(view, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32)
