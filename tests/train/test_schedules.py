"""The schedules against the reference implementation's own terms: mmcv's cosine hook and warm-up, and BYOL's momentum hook."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orl_fast.train.schedules import ema_momentum, learning_rate


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
    found = learning_rate(
        step,
        base_lr=0.4,
        steps_per_epoch=steps_per_epoch,
        num_epochs=num_epochs,
        warmup_epochs=warmup_epochs,
        cosine="epoch" if by_epoch else "step",
    )
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_warm_up_longer_than_the_run_stays_positive_and_finite() -> None:
    rates = [learning_rate(step, base_lr=0.4, steps_per_epoch=3, num_epochs=2, warmup_epochs=4) for step in range(6)]
    assert all(0 < rate < 0.4 for rate in rates)


def test_momentum_rises_from_its_base_towards_one() -> None:
    momenta = [ema_momentum(step, num_steps=1000, base=0.99) for step in range(1001)]
    assert momenta[0] == pytest.approx(0.99, rel=1e-12)
    assert momenta[500] == pytest.approx(0.995, rel=1e-12)
    assert momenta[1000] == 1
    assert all(earlier < later for earlier, later in itertools.pairwise(momenta))
