"""Multi-crop BYOL: its views and its loss."""

import numpy as np
import pytest
import torch

from orl_fast.config import Config
from orl_fast.methods import BYOL, METHODS
from orl_fast.methods.multicrop_byol import MultiCropBYOL, MultiCropConfig
from orl_fast.recipe import load_config
from orl_fast.views.normalize import normalize
from orl_fast.views.specs import RandomCrop
from tests.methods.formulas import unlike_at_the_start
from tests.synthetic import small_config, synthetic_batch

SMALL = ["multicrop-byol.small_size_px=32", "multicrop-byol.num_small=3"]


def test_two_large_and_four_small_crops_of_the_image() -> None:
    """The paper's Table 5c; everything else as in stage 1."""
    config = load_config("multicrop-byol")
    assert config.section(MultiCropConfig) == MultiCropConfig()
    assert Config(**{name: getattr(config, name) for name in Config.model_fields}) == Config()
    specs = MultiCropBYOL.views(config)
    assert [spec.size_px for spec in specs] == [224, 224, 96, 96, 96, 96]
    assert all(isinstance(spec.source, RandomCrop) and not spec.needs_rois for spec in specs)
    assert specs[:2] == BYOL.views(config)
    assert [spec.augmentation for spec in specs] == [specs[i % 2].augmentation for i in range(6)]


def test_the_loss_is_its_formula() -> None:
    """For each of the two targets, the mean over all other views of 2 - 2 cosine, summed: every view its own forward pass."""
    config = small_config(*SMALL)
    method, views = unlike_at_the_start("multicrop-byol", config), synthetic_batch("multicrop-byol", config, 4).views
    assert isinstance(method, MultiCropBYOL)
    found = method.loss(views)["loss"].item()
    method = unlike_at_the_start("multicrop-byol", config)
    assert isinstance(method, MultiCropBYOL)
    images = [normalize(view) for view in views.values()]
    with torch.no_grad():
        predictions = [method.predictor(projection) for projection in [method.online(image) for image in images]]
        targets = [method.target(image) for image in images[:2]]
    expected = 0.0
    for t, target in enumerate(targets):
        others = [prediction for i, prediction in enumerate(predictions) if i != t]
        assert len(others) == 4
        expected += float(np.mean([(2 - 2 * torch.cosine_similarity(other, target)).mean() for other in others]))
    assert found == pytest.approx(expected, rel=1e-5)


def test_without_small_crops_it_is_byol() -> None:
    config = small_config("multicrop-byol.num_small=0")
    losses = []
    for name in ("byol", "multicrop-byol"):
        method = unlike_at_the_start(name, config)
        losses.append(method.loss(synthetic_batch(name, config, 4).views)["loss"])
        losses[-1].backward()
    assert MultiCropBYOL.views(config) == BYOL.views(config)
    assert losses[0] == losses[1]


def test_it_is_chosen_by_name() -> None:
    assert METHODS["multicrop-byol"] is MultiCropBYOL
