"""Every image once per epoch, and the same global batches however they are shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.errors import ConfigError
from orl_fast.views.sampler import Sampler


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 300), batch=st.integers(1, 64), rest=st.integers(0, 63), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000)
)
def test_an_epoch_holds_every_image_at_most_once_and_all_that_fill_batches(
    steps: int, batch: int, rest: int, seed: int, epoch: int
) -> None:
    sampler = Sampler(num_images=steps * batch + rest % batch, batch_size=batch, seed=seed)
    assert sampler.steps_per_epoch == steps
    first = epoch * sampler.steps_per_epoch
    rows = np.concatenate([sampler.rows(first + step) for step in range(sampler.steps_per_epoch)])
    assert len(np.unique(rows)) == steps * batch
    assert rows.min() >= 0
    assert rows.max() < sampler.num_images
    assert sampler.epoch_of(first) == epoch == sampler.epoch_of(first + sampler.steps_per_epoch - 1)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 3), (2, 3)])
def test_ranks_and_accumulation_share_the_same_global_batch(world_size: int, accumulate: int) -> None:
    whole = Sampler(num_images=1000, batch_size=24, seed=3)
    shared = Sampler(num_images=1000, batch_size=24, world_size=world_size, accumulate=accumulate, seed=3)
    assert whole.steps_per_epoch == shared.steps_per_epoch == 41
    for step in (0, 17, 40, 41, 100):
        parts = [shared.rows(step, rank=rank, micro=micro) for micro in range(accumulate) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole.rows(step))


def test_orders_differ_between_seeds_and_epochs_and_look_random() -> None:
    orders = [Sampler(num_images=10_000, batch_size=10_000, seed=seed).rows(epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        assert all((order == other).mean() < 0.01 for other in orders[i + 1 :])


def test_any_place_of_a_hundred_million_images_is_reached_at_once() -> None:
    sampler = Sampler(num_images=100_000_000, batch_size=1000, seed=0)
    rows = np.concatenate([sampler.rows(step) for step in (0, 50_000, 99_999)])
    assert len(np.unique(rows)) == 3000
    assert rows.min() >= 0
    assert rows.max() < 100_000_000


def test_too_few_images_for_a_batch_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"only 10 images.*batch_size to at most 10"):
        Sampler(num_images=10, batch_size=16, world_size=4, seed=0)
    for wrong in ({"batch_size": 0}, {"world_size": 0}, {"accumulate": 0}, {"num_images": 0}):
        with pytest.raises(ConfigError, match="1 or more"):
            Sampler(**{"num_images": 10, "batch_size": 1, "seed": 0, **wrong})


def test_a_global_batch_is_shared_evenly_or_refused() -> None:
    shared = Sampler(batch_size=24, num_images=100, world_size=2, accumulate=3, seed=0)
    assert (shared.micro_batch, shared.batch_size, shared.steps_per_epoch) == (4, 24, 4)
    for batch_size in (27, 3):
        with pytest.raises(
            ConfigError, match=rf"train\.batch_size = {batch_size}: not a multiple of 2 ranks × 3 micro-batches; use a multiple of 6"
        ):
            Sampler(batch_size=batch_size, num_images=100, world_size=2, accumulate=3, seed=0)
