"""ORL: Xie et al., "Unsupervised Object-Level Representation Learning from Scene Images", NeurIPS 2021; stage 3."""

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from orl_fast.config import Config, NonNegative, Section
from orl_fast.methods.byol import follow, predictor, symmetric_loss, two_views
from orl_fast.methods.method import Method, normalized
from orl_fast.models import Network, frozen_copy, project
from orl_fast.views.specs import Augmentation, JitteredRoi, OwnRoi, PairPartner, PairQuery, Source, ViewSpec

# The two views of each level.
_VIEWS = {"image": ("view1", "view2"), "intra": ("roi", "jittered_roi"), "inter": ("query_roi", "partner_roi")}


class OrlConfig(Section):
    """Loss weights of the three levels (paper, equation 5). A level whose weight is 0 is neither drawn nor computed."""

    image_weight: NonNegative = 1.0
    intra_weight: NonNegative = 1.0
    inter_weight: NonNegative = 1.0

    @property
    def weights(self) -> dict[str, float]:
        """By level, those in use."""
        weights = {"image": self.image_weight, "intra": self.intra_weight, "inter": self.inter_weight}
        return {level: weight for level, weight in weights.items() if weight > 0}

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.weights:
            raise ValueError("image_weight, intra_weight and inter_weight are all 0, so nothing would be learned; set one")
        return self


class ORL(Method):
    """BYOL on three levels (section 3.3): two views of the image, an RoI and its jittered copy, an RoI and its partner elsewhere.

    One backbone and projector serve all levels, each level has its own predictor.
    """

    Settings = OrlConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weights = config.section(OrlConfig).weights
        self.online = Network(config.model.backbone, (config.model.projector_hidden, config.model.projector_out))
        self.target = frozen_copy(self.online)
        self.predictors = nn.ModuleDict({level: predictor(config) for level in self.weights})

    @staticmethod
    def views(config: Config) -> tuple[ViewSpec, ...]:
        size_px, augmentations = config.views.patch_size_px, 2 * Augmentation.pair(config.views)
        sources: tuple[Source, ...] = (OwnRoi(), JitteredRoi.of(config.views, config.variant), PairQuery(), PairPartner())
        each = zip(_VIEWS["intra"] + _VIEWS["inter"], sources, augmentations, range(3, 7), strict=True)
        patches = (
            ViewSpec(name=name, size_px=size_px, source=source, augmentation=augmentation, stream=stream)
            for name, source, augmentation, stream in each
        )
        specs = {spec.name: spec for spec in (*two_views(config), *patches)}
        return tuple(specs[name] for level in config.section(OrlConfig).weights for name in _VIEWS[level])

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = {level: [normalized(views[name]) for name in _VIEWS[level]] for level in self.weights}
        online = self._project(self.online, images)
        with torch.no_grad():
            target = self._project(self.target, images)
        losses = {level: symmetric_loss(self.predictors[level], online[level], target[level]) for level in images}
        total = torch.stack([self.weights[level] * loss for level, loss in losses.items()]).sum()
        return {"loss": total} | {level: loss.detach() for level, loss in losses.items()}

    def after_step(self, step: int, num_steps: int) -> dict[str, float]:
        return follow(self.target, self.online, step, num_steps, base=self.config.optim.ema_momentum)

    def _project(self, network: Network, images: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Two projections for each level. Joined views make one pass over the images and one over all patches."""
        projected: dict[str, list[Tensor]] = {}
        for size in (("image",), ("intra", "inter")):
            levels = [level for level in size if level in images]
            outputs = project(network, [view for level in levels for view in images[level]], joined=self.config.train.joined_views)
            projected |= {level: outputs[2 * i : 2 * i + 2] for i, level in enumerate(levels)}
        return projected
