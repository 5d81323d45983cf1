"""Multi-crop BYOL: small crops of the image, too, predict the targets of its two large ones (ORL, Table 5c; multi-crop of SwAV, 2020)."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from orl_fast.config import Config, Section, ShareSpan, SizePx
from orl_fast.methods.byol import BYOL, byol_loss, two_views
from orl_fast.methods.method import normalized
from orl_fast.models import project
from orl_fast.views.specs import Augmentation, RandomCrop, ViewSpec


class MultiCropConfig(Section):
    """The small crops. The ORL paper gives their number and size; their share of the image is SwAV's."""

    num_small: Annotated[int, Field(ge=0, le=13)] = 4  # each needs a stream of its own
    small_size_px: SizePx = 96
    small_area: ShareSpan = (0.05, 0.14)


class MultiCropBYOL(BYOL):
    """Each view's prediction against the target projections of the two large crops, other than its own.

    For each of the two targets the losses of the other views are averaged; without small crops that is BYOL. The target network sees
    the large crops only. Each view is its own forward pass; `train.joined_views` joins those of one size.
    """

    Settings = MultiCropConfig
    recipe = "multicrop-byol"

    @staticmethod
    def views(config: Config) -> tuple[ViewSpec, ...]:
        settings, augmentations = config.section(MultiCropConfig), Augmentation.pair(config.views)
        source = RandomCrop(area=settings.small_area, aspect=config.views.crop_aspect)
        small = (
            ViewSpec(name=f"small{i + 1}", size_px=settings.small_size_px, source=source, augmentation=augmentations[i % 2], stream=3 + i)
            for i in range(settings.num_small)
        )
        return (*two_views(config), *small)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joined = self.config.train.joined_views
        images = [normalized(views[spec.name]) for spec in self.views(self.config)]
        online = project(self.online, images[:2], joined=joined) + project(self.online, images[2:], joined=joined)
        with torch.no_grad():
            targets = project(self.target, images[:2], joined=joined)
        predictions = [self.predictor(projection) for projection in online]
        losses = [[byol_loss(prediction, target) for i, prediction in enumerate(predictions) if i != t] for t, target in enumerate(targets)]
        return {"loss": torch.stack([torch.stack(others).mean() for others in losses]).sum()}
