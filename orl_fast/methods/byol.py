"""BYOL: Grill et al., "Bootstrap your own latent", NeurIPS 2020; stage 1 of ORL and the image-level term of its stage 3."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from orl_fast.config import Config
from orl_fast.methods.method import Method, normalized
from orl_fast.models import Mlp, Network, ema_momentum, frozen_copy, project, update_target
from orl_fast.views.specs import Augmentation, RandomCrop, ViewSpec


class BYOL(Method):
    """Predict, from one view of an image, the target network's projection of the other view.

    Each view is its own forward pass, with its own batch statistics; `train.joined_views` departs from that.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.online = Network(config.model.backbone, (config.model.projector_hidden, config.model.projector_out))
        self.target = frozen_copy(self.online)
        self.predictor = predictor(config)

    @staticmethod
    def views(config: Config) -> tuple[ViewSpec, ...]:
        return two_views(config)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = [normalized(views[name]) for name in ("view1", "view2")]
        online = project(self.online, images, joined=self.config.train.joined_views)
        with torch.no_grad():
            target = project(self.target, images, joined=self.config.train.joined_views)
        return {"loss": symmetric_loss(self.predictor, online, target)}

    def after_step(self, step: int, num_steps: int) -> dict[str, float]:
        return follow(self.target, self.online, step, num_steps, base=self.config.optim.ema_momentum)


def two_views(config: Config) -> tuple[ViewSpec, ...]:
    """Two random resized crops of the image (paper, appendix A)."""
    size_px, source = config.views.image_size_px, RandomCrop(area=config.views.crop_area, aspect=config.views.crop_aspect)
    augmentations = enumerate(Augmentation.pair(config.views), start=1)
    return tuple(ViewSpec(name=f"view{i}", size_px=size_px, source=source, augmentation=each, stream=i) for i, each in augmentations)


def predictor(config: Config) -> Mlp:
    """[B, D] projections of the online network → [B, D]: built like the projector."""
    return Mlp((config.model.projector_out, config.model.predictor_hidden, config.model.projector_out))


def follow(target: Network, online: Network, step: int, num_steps: int, *, base: float) -> dict[str, float]:
    """Move the target network a little toward the online one."""
    momentum = ema_momentum(step, num_steps=num_steps, base=base)
    update_target(target, online, momentum=momentum)
    return {"ema_momentum": momentum}


def symmetric_loss(head: nn.Module, online: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Each view's prediction against the other's target, both directions summed (BYOL, equation 2): from 0 to 8.

    `online` and `target` are projections of two views, [B, D] each.
    """
    return byol_loss(head(online[0]), target[1]) + byol_loss(head(online[1]), target[0])


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """2 (1 - mean cosine): the squared distance of the unit vectors. [B, D] each, any float type; computed in float32."""
    return 2 * (1 - functional.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean())
