"""Schedule, color shifts and the loss over ranks, against plain formulas."""

import numpy as np
import pytest
import torch

from orl_fast.distributed import Ranks
from orl_fast.errors import ConfigError
from orl_fast.evals.labelled_shards import Part
from orl_fast.evals.linear import PROTOCOLS
from orl_fast.evals.supervised import Schedule, _images, _losses, fitting_batch, lighting_shifts
from orl_fast.philox import uniforms
from orl_fast.views import chance
from orl_fast.views.plan import Batch


@pytest.mark.parametrize(
    ("dataset", "epochs", "milestones"), [("imagenet", 28, (8, 16, 24)), ("places205", 14, (4, 8, 12)), ("inat18", 84, (24, 48, 72))]
)
def test_the_protocols_schedules(dataset: str, epochs: int, milestones: tuple[int, ...]) -> None:
    schedule = PROTOCOLS[dataset].schedule  # type: ignore[index]
    assert schedule.epochs == epochs
    steps_per_epoch = 5
    for step in range(epochs * steps_per_epoch):
        passed = sum(step >= milestone * steps_per_epoch for milestone in milestones)
        assert schedule.factor(step, steps_per_epoch=steps_per_epoch) == pytest.approx(0.1**passed)
    assert PROTOCOLS[dataset].lighting == (dataset == "imagenet")  # type: ignore[index]


def test_milestones_move_with_the_epochs() -> None:
    schedule = Schedule(epochs=20, milestones=(12, 16), gamma=0.2)
    assert schedule.scaled(None) is schedule.scaled(20) is schedule
    short = schedule.scaled(5)
    assert [short.factor(step, steps_per_epoch=2) for step in range(10)] == pytest.approx([1] * 6 + [0.2] * 2 + [0.04] * 2)


def test_color_shifts_are_alexnets_drawn_by_image() -> None:
    rows = np.arange(4000)
    shifts = lighting_shifts(3, 1, rows)
    # torchvision's references have the same numbers: rgb = sum over components of eigenvector * alpha * eigenvalue, alpha normal, std 0.1.
    directions = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    variances = np.array([0.2175, 0.0188, 0.0045])
    draws = uniforms(3, 1, 17, chance.LIGHTING_STREAM, 6)
    alpha = 0.1 * np.sqrt(-2 * np.log(1 - draws[:3])) * np.cos(2 * np.pi * draws[3:])
    assert shifts[17] == pytest.approx((directions * alpha * variances).sum(1))
    covariance = directions @ np.diag((0.1 * variances) ** 2) @ directions.T
    assert np.cov(shifts.T) == pytest.approx(covariance, abs=0.08 * covariance.max())
    assert np.array_equal(lighting_shifts(3, 1, rows[::-1])[::-1], shifts)  # of the image alone, whatever is in its batch
    assert not np.allclose(lighting_shifts(3, 2, rows), shifts)


def test_color_shifts_come_between_to_tensor_and_normalize() -> None:
    pixels = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nothing = np.empty(0, np.int64)
    batch = Batch(views={"view": pixels}, rows=np.array([5, 2, 9]), bad_rows=nothing, bad_sources=nothing)
    shifts = torch.from_numpy(lighting_shifts(0, 4, batch.rows)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for lighting, shift in (((0, 4), shifts[:, :, None, None]), (None, torch.zeros(1))):
        expected = (pixels.float() / 255 + shift - mean) / std
        torch.testing.assert_close(_images(batch, torch.device("cpu"), lighting=lighting), expected, rtol=1e-5, atol=1e-5)


def test_normal_draws_have_the_moments_of_a_normal() -> None:
    draws = chance.normals(0, 0, np.arange(20_000), 20, 2)
    assert draws.shape == (20_000, 2)
    assert np.isfinite(draws).all()
    assert draws.mean(0) == pytest.approx([0, 0], abs=0.02)
    assert draws.std(0) == pytest.approx([1, 1], abs=0.02)
    assert np.mean(np.abs(draws) < 1) == pytest.approx(0.6827, abs=0.01)


def test_the_loss_is_the_sum_over_classifiers_of_the_mean_over_images() -> None:
    logits = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    losses, num = _losses(logits, labels, Ranks())
    assert num == 6
    for loss, each in zip(losses, logits, strict=True):
        assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(each, labels).item())


@pytest.mark.parametrize(("images", "world_size", "expected"), [(300, 1, 256), (256, 4, 256), (255, 1, 128), (40, 2, 32), (3, 1, 2)])
def test_a_batch_of_few_images_is_the_largest_power_of_two(images: int, world_size: int, expected: int) -> None:
    part = Part(index=None, labels=np.zeros(images, np.int64))  # type: ignore[arg-type]
    assert fitting_batch(part, 256, Ranks(world_size=world_size)) == expected


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    part = Part(index=None, labels=np.zeros(100, np.int64))  # type: ignore[arg-type]
    for wanted, world_size in ((64, 3), (4, 4)):
        with pytest.raises(ConfigError, match="cannot share it evenly"):
            fitting_batch(part, wanted, Ranks(world_size=world_size))
