"""BYOL: Grill et al., "Bootstrap your own latent", NeurIPS 2020; stage 1 of ORL and the image-level term of its stage 3."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from orl_fast.config import Config
from orl_fast.methods.method import Method, normalized
from orl_fast.models.heads import predictor
from orl_fast.models.momentum import Branch, frozen_copy, project, update_target
from orl_fast.views.loader import Views


class BYOL(Method):
    """Predict, from one view of an image, the target network's projection of the other view.

    Each view is its own forward pass, with its own batch statistics; `train.joined_views` departs from that.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.online = Branch(config.model)
        self.target = frozen_copy(self.online)
        self.predictor = predictor(config.model.projector_out, hidden=config.model.predictor_hidden)

    def loss(self, views: Views) -> dict[str, Tensor]:
        assert views.image is not None
        images = [normalized(view) for view in views.image]
        online = project(self.online, images, joined=self.config.train.joined_views)
        with torch.no_grad():
            target = project(self.target, images, joined=self.config.train.joined_views)
        return {"loss": symmetric_loss(self.predictor, online, target)}

    def after_step(self, *, momentum: float) -> None:
        update_target(self.target, self.online, momentum=momentum)


def symmetric_loss(head: nn.Module, online: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Each view's prediction against the other's target, both directions summed (BYOL, equation 2): from 0 to 8.

    Args:
        online, target: projections of two views, [B, D] each.
    """
    return byol_loss(head(online[0]), target[1]) + byol_loss(head(online[1]), target[0])


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """2 (1 - mean cosine): the squared distance of the unit vectors. [B, D] each, any float type; computed in float32."""
    return 2 * (1 - functional.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean())
