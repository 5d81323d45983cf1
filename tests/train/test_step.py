"""The step on synthetic views: it learns, and it does what its options say."""

import pytest
import torch
from synthetic_views import part_of, small_config, synthetic_views

from orl_fast.config import Config
from orl_fast.train.distributed import Ranks
from orl_fast.train.metrics import Meter
from orl_fast.train.step import TrainStep


def _train(method: str, config: Config, *, num_steps: int, same_views: bool = False) -> tuple[TrainStep, list[float]]:
    ranks = Ranks()
    train_step, meter, losses = TrainStep(method, config, ranks=ranks), Meter(ranks), []
    train_step.connect()
    for step in range(num_steps):
        views = synthetic_views(0 if same_views else step, config.train.batch_size)
        size = train_step.micro_batch
        batches = iter([part_of(views, micro * size, (micro + 1) * size) for micro in range(config.train.accumulate)])
        train_step(batches, step=step, rate=0.05, momentum=0.99, meter=meter)
        losses.append(meter.read()["loss"])
    return train_step, losses


@pytest.mark.parametrize("method", ["byol", "orl"])
def test_the_loss_goes_down_on_the_same_views(method: str) -> None:
    _, losses = _train(method, small_config("batch_size=8"), num_steps=15, same_views=True)
    assert losses[-1] < 0.5 * losses[0]


def test_weight_decay_and_momentum_reach_every_parameter() -> None:
    """Without a gradient, SGD with momentum and weight decay is p ← p - rate * v, v ← 0.9 v + 1e-4 p."""
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
    config = small_config("batch_size=8")
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
        train_step, meter, views = TrainStep("byol", config, ranks=Ranks()), Meter(Ranks()), synthetic_views(0, 4)
        train_step(iter([views] * config.train.accumulate), step=0, rate=0.1, momentum=0.5, meter=meter)
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
