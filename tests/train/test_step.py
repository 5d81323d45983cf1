"""The step on synthetic views: it learns, and it follows its options. The learning rate against mmcv's cosine hook and warm-up."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orl_fast.config import Config, OptimConfig, TrainConfig
from orl_fast.distributed import Ranks
from orl_fast.errors import ConfigError, DataError
from orl_fast.methods import BYOL, METHODS
from orl_fast.train.metrics import Meter
from orl_fast.train.step import TrainStep, learning_rate
from tests.synthetic import part_of, small_config, synthetic_batch


def _train(method: str, config: Config, *, num_steps: int, same_views: bool = False) -> tuple[TrainStep, list[float]]:
    ranks = Ranks()
    train_step, meter, losses = TrainStep(method, config, ranks=ranks), Meter(ranks), []
    train_step.connect()
    accumulate, size = config.train.accumulate, config.train.batch_size // config.train.accumulate
    for step in range(num_steps):
        batch = synthetic_batch(method, config, config.train.batch_size, step=0 if same_views else step)
        parts = iter([part_of(batch, micro * size, (micro + 1) * size) for micro in range(accumulate)])
        train_step(parts, step=step, num_steps=num_steps, lr=0.05, meter=meter)
        losses.append(meter.read()["loss"])
    return train_step, losses


@pytest.mark.parametrize("method", ["byol", "orl"])
def test_the_loss_goes_down_on_the_same_views(method: str) -> None:
    _, losses = _train(method, small_config("batch_size=8"), num_steps=15, same_views=True)
    assert losses[-1] < 0.5 * losses[0]


def test_weight_decay_and_momentum_reach_every_parameter() -> None:
    """Without a gradient, SGD with momentum and weight decay is p ← p - lr * v, v ← 0.9 v + 1e-4 p."""
    config = small_config("batch_size=8")
    train_step = TrainStep("byol", config, ranks=Ranks())
    before = {name: value.detach().clone().double() for name, value in train_step.method.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in before.items()}
    for group in train_step.optimizer.param_groups:
        group["lr"] = 0.3
    for _ in range(3):
        for parameter in train_step.method.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        train_step.optimizer.step()
        for name, value in before.items():
            velocity[name] = 0.9 * velocity[name] + 1e-4 * value
            value -= 0.3 * velocity[name]
    for name, found in train_step.method.named_parameters():
        if not name.startswith("target."):
            torch.testing.assert_close(found.detach().double(), before[name], rtol=1e-6, atol=1e-7)


def test_the_target_follows_the_updated_online_network() -> None:
    config = small_config("batch_size=8", "ema_momentum=0.99")
    start = TrainStep("byol", config, ranks=Ranks()).method.state_dict()
    train_step, _ = _train("byol", config, num_steps=1)
    after = train_step.method.state_dict()
    for name in (key for key, value in train_step.method.named_parameters() if key.startswith("target.") and value.ndim > 1):
        expected = 0.99 * start[name].double() + 0.01 * after[name.replace("target.", "online.")].double()
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(after[name], start[name])


def test_accumulated_gradients_are_those_of_the_mean_loss() -> None:
    """Two micro-batches that hold the same images give what one of them gives."""
    single, double = small_config("batch_size=4"), small_config("batch_size=8", "accumulate=2")
    states = []
    for config in (single, double):
        train_step, meter, batch = TrainStep("byol", config, ranks=Ranks()), Meter(Ranks()), synthetic_batch("byol", config, 4)
        train_step(iter([batch] * config.train.accumulate), step=0, num_steps=2, lr=0.1, meter=meter)
        states.append(dict(train_step.method.named_parameters()))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights() -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        train_step, losses = _train("orl", small_config("batch_size=8", f"precision={precision}"), num_steps=3)
        assert all(parameter.dtype == torch.float32 for parameter in train_step.method.parameters())
        found[precision] = losses
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.1)


def test_the_same_seed_and_steps_give_the_same_bits() -> None:
    states = [_train("orl", small_config("batch_size=8"), num_steps=3)[0].method.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_hooks_are_called_around_every_step_and_randomness_is_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Noting(BYOL):
        def before_step(self, step: int, num_steps: int) -> None:
            calls.append(("before", step, num_steps, torch.rand(()).item()))

        def loss(self, views: Any) -> Any:
            calls.append("loss")
            return super().loss(views)

        def after_step(self, step: int, num_steps: int) -> dict[str, float]:
            assert all(parameter.grad is None for parameter in self.parameters())
            calls.append(("after", step, num_steps))
            return {"temperature": 0.5 * step}

    monkeypatch.setitem(METHODS, "noting", Noting)
    config = small_config("batch_size=4", "accumulate=2")
    train_step, meter = TrainStep("noting", config, ranks=Ranks()), Meter(Ranks())
    batch = synthetic_batch("noting", config, 2)
    logged = [train_step(iter([batch] * 2), step=step, num_steps=9, lr=0.1, meter=meter) for step in (3, 4, 3)]
    assert logged == [{"lr": 0.1, "temperature": 0.5 * step} for step in (3, 4, 3)]
    draws = [call[3] for call in calls if call[0] == "before"]
    assert [call if call == "loss" else call[:3] for call in calls] == [
        part for step in (3, 4, 3) for part in (("before", step, 9), "loss", "loss", ("after", step, 9))
    ]
    assert draws[0] == draws[2] != draws[1]


def test_batches_that_batch_norm_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="two images in each of 2 ranks × 3 micro-batches; use 12 or more"):
        TrainStep("byol", small_config("batch_size=6", "accumulate=3"), ranks=Ranks(world_size=2))
    config = small_config("batch_size=4")
    batch = part_of(synthetic_batch("byol", config, 4), 0, 1)
    with pytest.raises(DataError, match="step 7: 1 of 1 images could be decoded; run orl-fast verify"):
        TrainStep("byol", config, ranks=Ranks())(iter([batch]), step=7, num_steps=9, lr=0.1, meter=Meter(Ranks()))


def test_views_that_the_backbone_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="side of the view 'view2' = 16: too small for the backbone"):
        TrainStep("byol", small_config("backbone=densenet121", "image_size_px=16", "patch_size_px=16"), ranks=Ranks())


def test_groups_are_scaled_as_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoGroups(BYOL):
        def parameter_groups(self) -> list[dict[str, Any]]:
            return [{"params": self.online.backbone.parameters()}, {"params": self.online.projector.parameters(), "lr_scale": 0.1}]

    monkeypatch.setitem(METHODS, "two-groups", TwoGroups)
    config = small_config("batch_size=4")
    train_step, meter, batch = TrainStep("two-groups", config, ranks=Ranks()), Meter(Ranks()), synthetic_batch("two-groups", config, 4)
    for lr in (0.5, 0.25):
        train_step(iter([batch]), step=0, num_steps=9, lr=lr, meter=meter)
        assert [group["lr"] for group in train_step.optimizer.param_groups] == [lr, pytest.approx(0.1 * lr)]


def _schedule(*, num_epochs: int, warmup_epochs: float, cosine: str = "auto", variant: str = "official") -> Config:
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
    config = _schedule(num_epochs=num_epochs, warmup_epochs=warmup_epochs, cosine="epoch" if by_epoch else "step")
    assert learning_rate(step, config, steps_per_epoch=steps_per_epoch) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("variant", "same_as"), [("official", "epoch"), ("paper", "step")])
def test_the_variant_decides_where_the_cosine_is_not_asked_for(variant: str, same_as: str) -> None:
    automatic, asked_for = (_schedule(num_epochs=5, warmup_epochs=1, cosine=cosine, variant=variant) for cosine in ("auto", same_as))
    other = _schedule(num_epochs=5, warmup_epochs=1, cosine="step" if same_as == "epoch" else "epoch", variant=variant)
    rates, expected, others = ([learning_rate(step, c, steps_per_epoch=7) for step in range(35)] for c in (automatic, asked_for, other))
    assert rates == expected != others


def test_warm_up_longer_than_the_run_stays_positive_and_finite() -> None:
    config = _schedule(num_epochs=2, warmup_epochs=4)
    assert all(0 < learning_rate(step, config, steps_per_epoch=3) < 0.4 for step in range(6))
