"""What the training loop asks of a method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orl_fast.config import Config, Section
from orl_fast.models.network import Network
from orl_fast.views.normalize import normalize
from orl_fast.views.specs import ViewSpec


class Method(nn.Module, ABC):
    """A self-supervised method: its views, its networks, its loss, and what happens around a step.

    All random initialization belongs in `__init__`; the seed is set before it. Tensors that a resumed run needs are parameters or buffers.

    """

    Settings: ClassVar[type[Section]] = Section  # its own section of a recipe, read with `config.section(Settings)`; empty without settings
    recipe: ClassVar[str] = "coco-r50"  # the shipped recipe that a run without --recipe uses
    online: Network  # what it trains; its backbone and projector go to mining, evaluations and export

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    @abstractmethod
    def views(config: Config) -> tuple[ViewSpec, ...]:
        """The views of each image; `loss` receives them under their names."""

    @abstractmethod
    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name: "loss", to be minimized, and what else the log should show, detached.

        `views` are [B, 3, S, S] uint8 by name, on the device (see `normalized`).
        """

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Distributed data parallel hooks into forward, so that all of a step's passes are one call.
        return self.loss(views)

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum in one fused kernel; weight decay also on batch norm and biases (ORL, appendix A). Its lr is set in every step.

        A parameter group with an "lr_scale" gets the schedule's lr times that.
        """
        optim = self.config.optim
        return torch.optim.SGD(self.parameter_groups(), lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer updates, as torch's parameter groups: all that is learned, in one group."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def before_step(self, step: int, num_steps: int) -> None:
        """Called before the forward passes of a step, 0-based."""

    def after_step(self, step: int, num_steps: int) -> dict[str, float]:
        """Called after the optimizer's step, with what the log should show."""
        return {}


def normalized(view: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] → normalized floats, on the same device, in the precision that the forward pass computes in."""
    device = view.device.type
    return normalize(view, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32)
