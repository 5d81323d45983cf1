"""BYOL and ORL against their formulas, written out in float64 numpy from the layers' outputs."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orl_fast.config import Config, load_config
from orl_fast.methods import BYOL, METHODS, ORL
from orl_fast.methods.byol import byol_loss
from orl_fast.models import Branch
from orl_fast.views.loader import Views
from orl_fast.views.normalize import normalize

SMALL = ["backbone=resnet18", "projector_hidden=24", "projector_out=16", "predictor_hidden=24", "image_size_px=48", "patch_size_px=32"]


def small_config(*overrides: str) -> Config:
    return load_config(overrides=[*SMALL, *overrides])


def draw_views(batch: int = 4, *, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)

    def pair(size: int) -> tuple[Tensor, Tensor]:
        first, second = torch.randint(0, 256, (2, batch, 3, size, size), dtype=torch.uint8, generator=generator)
        return first.to(memory_format=torch.channels_last), second.to(memory_format=torch.channels_last)

    return Views(image=pair(48), intra=pair(32), inter=pair(32), rows=np.arange(batch), num_skipped=0)


def _method(kind: type[Any], config: Config) -> Any:
    """With the target moved off the online branch, so that confusing the two shows."""
    torch.manual_seed(0)
    method = kind(config)
    with torch.no_grad():
        for parameter in method.target.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    return method


def _expected(online: Branch, target: Branch, head: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
    """The sum over both directions of the mean squared distance of unit vectors."""
    online, target, head = copy.deepcopy(online), copy.deepcopy(target), copy.deepcopy(head)
    with torch.no_grad():
        views = [normalize(view, torch.float32) for view in pair]
        predictions = [head(online(view)).double().numpy() for view in views]
        targets = [target(view).double().numpy() for view in views]
    total = 0.0
    for prediction, other in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        p = prediction / np.sqrt((prediction**2).sum(1, keepdims=True))
        z = other / np.sqrt((other**2).sum(1, keepdims=True))
        total += float(((p - z) ** 2).sum(1).mean())
    return total


def test_byol_is_its_formula() -> None:
    method, views = _method(BYOL, small_config()), draw_views()
    assert views.image is not None
    expected = _expected(method.online, method.target, method.predictor, views.image)
    losses = method.loss(views)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 8


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.5), (0.0, 2.0, 0.0)])
def test_orl_is_its_formula_and_leaves_out_terms_of_weight_0(weights: tuple[float, float, float]) -> None:
    names = ("image", "intra", "inter")
    config = small_config(*(f"{name}_weight={weight}" for name, weight in zip(names, weights, strict=True)))
    method, views = _method(ORL, config), draw_views()
    used = [name for name, weight in zip(names, weights, strict=True) if weight]
    assert sorted(method.predictors) == sorted(used)
    pairs = {"image": views.image, "intra": views.intra, "inter": views.inter}
    expected = {name: _expected(method.online, method.target, method.predictors[name], pairs[name]) for name in used}
    missing = {name: None for name in names if name not in used}
    losses = method.loss(Views(**{**pairs, **missing}, rows=views.rows, num_skipped=0))
    assert {name: losses[name].item() for name in used} == pytest.approx(expected, rel=1e-5)
    assert set(losses) == {"loss", *used}
    total = sum(weight * expected.get(name, 0) for name, weight in zip(names, weights, strict=True))
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_gradients_reach_all_of_the_online_network_and_none_of_the_target() -> None:
    for kind in METHODS.values():
        method = _method(kind, small_config())
        method.loss(draw_views())["loss"].backward()
        for name, parameter in method.named_parameters():
            assert (parameter.grad is None) == name.startswith("target."), name


def test_gradient_of_the_loss_ignores_the_target() -> None:
    prediction = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    byol_loss(prediction, target).backward()
    assert target.grad is None
    p, z = prediction.detach().numpy(), target.detach().numpy()
    unit_p, unit_z = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (p, z))
    along = (unit_p * unit_z).sum(1, keepdims=True)
    expected = -2 / len(p) * (unit_z - along * unit_p) / np.linalg.norm(p, axis=1, keepdims=True)
    np.testing.assert_allclose(prediction.grad.numpy(), expected, rtol=1e-4)  # type: ignore[union-attr]


def test_joined_views_make_one_pass_for_each_size() -> None:
    for kind, apart, joined in ((BYOL, 2, 1), (ORL, 6, 2)):
        for joined_views, expected in ((False, apart), (True, joined)):
            method = _method(kind, small_config(f"joined_views={str(joined_views).lower()}"))
            method.loss(draw_views())
            for branch in (method.online, method.target):
                assert branch.projector[1].num_batches_tracked == expected


def test_initialization_is_the_seeds() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(ORL(small_config()).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
