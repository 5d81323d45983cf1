"""What the loop, the loader and the checkpoints rely on, for every method."""

import math

import pytest
import torch

from orl_fast.config import Config, Section
from orl_fast.methods import METHODS
from orl_fast.models import Network
from orl_fast.recipe import load_config, recipe_names
from tests.methods.formulas import unlike_at_the_start
from tests.synthetic import small_config, synthetic_batch

pytestmark = pytest.mark.parametrize("name", METHODS)


def test_views_have_names_and_streams_of_their_own(name: str) -> None:
    specs = METHODS[name].views(Config())
    assert len({spec.name for spec in specs}) == len({spec.stream for spec in specs}) == len(specs) > 0
    assert all(1 <= spec.stream <= 15 for spec in specs)


def test_its_section_and_recipe_are_there(name: str) -> None:
    method = METHODS[name]
    assert method.recipe in recipe_names()
    config = load_config(method.recipe)
    assert type(config.section(method.Settings)) is method.Settings
    assert issubclass(method.Settings, Section)


def test_gradients_reach_all_that_is_learned_and_nothing_else(name: str) -> None:
    config = small_config()
    method = unlike_at_the_start(name, config)
    losses = method.loss(synthetic_batch(name, config, 4).views)
    assert losses["loss"].ndim == 0
    assert not any(value.requires_grad for key, value in losses.items() if key != "loss")
    losses["loss"].backward()
    for key, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    assert all(parameter.requires_grad for parameter in method.online.parameters())


def test_the_optimizer_updates_all_that_is_learned_once(name: str) -> None:
    method = METHODS[name](small_config())
    updated = [parameter for group in method.optimizer().param_groups for parameter in group["params"]]
    assert len(updated) == len({id(parameter) for parameter in updated})
    assert {id(parameter) for parameter in updated} == {id(value) for value in method.parameters() if value.requires_grad}


def test_initialization_is_the_seeds(name: str) -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(METHODS[name](small_config()).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_hooks_around_a_step_log_finite_numbers(name: str) -> None:
    method = METHODS[name](small_config())
    for step in (0, 3):
        method.before_step(step, 4)
        assert all(math.isfinite(value) for value in method.after_step(step, 4).values())


def test_what_is_mined_and_evaluated_is_a_network_of_its_own(name: str) -> None:
    method = METHODS[name](small_config())
    assert isinstance(method.online, Network)
    rebuilt = Network.from_description(method.online.description)
    rebuilt.load_state_dict(method.online.state_dict())
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images), method.online.eval()(images))
