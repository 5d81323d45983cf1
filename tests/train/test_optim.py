"""The learning rate against the reference implementation's own terms: mmcv's cosine hook and warm-up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orl_fast.config import Config, OptimConfig, TrainConfig
from orl_fast.train.optim import learning_rate, peak_learning_rate, set_learning_rate


def _config(*, num_epochs: int, warmup_epochs: float, cosine: str = "auto", variant: str = "official") -> Config:
    """Its peak is 0.4."""
    optim = OptimConfig(lr_per_256=0.8, warmup_epochs=warmup_epochs, cosine=cosine)  # type: ignore[arg-type]
    return Config(optim=optim, train=TrainConfig(epochs=num_epochs, batch_size=128), variant=variant)  # type: ignore[arg-type]


def _mmcv(step: int, *, base_lr: float, steps_per_epoch: int, num_epochs: int, warmup_epochs: int, by_epoch: bool) -> float:
    """Written from mmcv's LrUpdaterHook, warmup="linear", warmup_by_epoch=True, warmup_ratio=1e-4, min_lr=0."""
    progress, most = (step // steps_per_epoch, num_epochs) if by_epoch else (step, num_epochs * steps_per_epoch)
    regular = 0.5 * base_lr * (math.cos(math.pi * progress / most) + 1)
    warmup_iters = warmup_epochs * steps_per_epoch
    if step >= warmup_iters:
        return regular
    k = (1 - step / warmup_iters) * (1 - 1e-4)
    return regular * (1 - k)


@given(
    step_share=st.floats(0, 1, exclude_max=True),
    steps_per_epoch=st.integers(1, 500),
    num_epochs=st.integers(1, 800),
    warmup_epochs=st.integers(0, 10),
    by_epoch=st.booleans(),
)
def test_learning_rate_is_the_references(
    step_share: float, steps_per_epoch: int, num_epochs: int, warmup_epochs: int, by_epoch: bool
) -> None:
    step = int(step_share * steps_per_epoch * num_epochs)
    expected = _mmcv(
        step, base_lr=0.4, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs, warmup_epochs=warmup_epochs, by_epoch=by_epoch
    )
    config = _config(num_epochs=num_epochs, warmup_epochs=warmup_epochs, cosine="epoch" if by_epoch else "step")
    assert peak_learning_rate(config) == 0.4
    assert learning_rate(step, config, steps_per_epoch=steps_per_epoch) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("variant", "same_as"), [("official", "epoch"), ("paper", "step")])
def test_the_variant_decides_where_the_cosine_is_not_asked_for(variant: str, same_as: str) -> None:
    automatic, asked_for = (_config(num_epochs=5, warmup_epochs=1, cosine=cosine, variant=variant) for cosine in ("auto", same_as))
    other = _config(num_epochs=5, warmup_epochs=1, cosine="step" if same_as == "epoch" else "epoch", variant=variant)
    rates, expected, others = ([learning_rate(step, c, steps_per_epoch=7) for step in range(35)] for c in (automatic, asked_for, other))
    assert rates == expected != others


def test_warm_up_longer_than_the_run_stays_positive_and_finite() -> None:
    config = _config(num_epochs=2, warmup_epochs=4)
    assert all(0 < learning_rate(step, config, steps_per_epoch=3) < 0.4 for step in range(6))


def test_groups_are_scaled_as_they_ask() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], **scale} for scale in ({}, {"lr_scale": 0.1})]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    for lr in (0.5, 0.25):
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, pytest.approx(0.1 * lr)]
