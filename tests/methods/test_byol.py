import numpy as np
import pytest
import torch

from orl_fast.methods import BYOL
from orl_fast.methods.byol import byol_loss
from tests.methods.formulas import symmetric_loss, unlike_at_the_start
from tests.synthetic import small_config, synthetic_batch


def test_the_loss_is_its_formula() -> None:
    config = small_config()
    method, views = unlike_at_the_start("byol", config), synthetic_batch("byol", config, 4).views
    assert isinstance(method, BYOL)
    expected = symmetric_loss(method.online, method.target, method.predictor, views["view1"], views["view2"])
    losses = method.loss(views)
    assert list(losses) == ["loss"]
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 8


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


def test_joined_views_make_one_pass() -> None:
    for joined, expected in (("false", 2), ("true", 1)):
        config = small_config(f"joined_views={joined}")
        method = BYOL(config)
        method.loss(synthetic_batch("byol", config, 4).views)
        assert method.online.projector[1].num_batches_tracked == method.target.projector[1].num_batches_tracked == expected


def test_the_target_follows_with_a_momentum_that_rises_to_one() -> None:
    method = unlike_at_the_start("byol", small_config("ema_momentum=0.9"))
    assert isinstance(method, BYOL)
    before = [value.detach().clone().double() for value in method.target.parameters()]
    assert method.after_step(0, 100) == {"ema_momentum": pytest.approx(0.9)}
    for old, online, new in zip(before, method.online.parameters(), method.target.parameters(), strict=True):
        torch.testing.assert_close(new.double(), 0.9 * old + 0.1 * online.detach().double(), rtol=1e-5, atol=1e-6)
    assert method.after_step(50, 100)["ema_momentum"] == pytest.approx(0.95)
    still = [value.clone() for value in method.target.parameters()]
    assert method.after_step(100, 100) == {"ema_momentum": 1}
    assert all(torch.equal(a, b) for a, b in zip(still, method.target.parameters(), strict=True))
