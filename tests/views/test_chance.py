"""The draws of a view: torchvision's algorithm for the crop, the paper's probabilities and ranges for the rest."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torchvision import transforms

from orl_fast.config import ViewsConfig
from orl_fast.philox import uniform
from orl_fast.views import Augmentation
from orl_fast.views.chance import augmentations, choices, random_resized_crops

_NUM, _SEED, _EPOCH, _STREAM = 60, 9, 4, 2


def _draws_of(row: int) -> tuple[Iterator[float], Iterator[float]]:
    """Ours, in the order in which torchvision asks: area and aspect of each try; top and left."""
    drawn = [uniform(_SEED, _EPOCH, row, _STREAM, i) for i in range(22)]
    return iter(drawn[:20]), iter([drawn[21], drawn[20]])


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (100, 100), (30, 900), (900, 30), (1, 1), (2, 500)])
@pytest.mark.parametrize(("area", "aspect"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.9), (0.3, 2.0))])
def test_crops_are_torchvisions(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision itself, in double precision, with our draws in place of its generator's."""
    rows = np.arange(_NUM)
    heights, widths = np.full(_NUM, height, np.int32), np.full(_NUM, width, np.int32)
    found = random_resized_crops(_SEED, _EPOCH, rows, _STREAM, heights, widths, area, aspect)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for row in rows.tolist():
            shapes, corners = _draws_of(row)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "uniform_", lambda out, low, high, shapes=shapes: out.fill_(low + next(shapes) * (high - low)))
                patch.setattr(torch, "randint", lambda _, stop, size, corners=corners: torch.tensor([int(next(corners) * stop)]))
                crop = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), scale=list(area), ratio=list(aspect))
            top, left, h, w = crop
            assert found[row].tolist() == [left, top, left + w, top + h]
    finally:
        torch.set_default_dtype(before)


def test_choices_are_uniform_and_within_their_counts() -> None:
    rows = np.arange(30_000)
    counts = rows % 3 + 1
    found = choices(1, 2, rows, 16, counts)
    assert (found >= 0).all()
    assert (found < counts).all()
    assert np.allclose(np.bincount(found[counts == 3]) / 10_000, 1 / 3, atol=0.02)
    assert np.array_equal(choices(1, 2, rows[5:9], 16, counts[5:9]), found[5:9])


def test_augmentations_have_the_papers_probabilities_and_ranges() -> None:
    num = 20_000
    drawn = augmentations(1, 0, np.arange(num), [1, 2], Augmentation.pair(ViewsConfig()))
    first, second = ({name: values[part] for name, values in drawn.items()} for part in (slice(num), slice(num, None)))
    for crop, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        jittered = crop["hue"] != 0
        found = [crop["flip"].mean(), jittered.mean(), crop["grayscale"].mean(), (crop["blur_sigma"] > 0).mean(), crop["solarize"].mean()]
        assert np.allclose(found, [0.5, 0.8, 0.2, blur, solarize], atol=0.012)
        for column, spread in enumerate((0.4, 0.4, 0.2)):
            factors = crop["factors"][jittered, column]
            assert (crop["factors"][~jittered] == 1).all()
            assert abs(factors.min() - (1 - spread)) < 0.01
            assert abs(factors.max() - (1 + spread)) < 0.01
            assert abs(factors.mean() - 1) < 0.01
        assert 0.099 < np.abs(crop["hue"]).max() <= 0.1
        sigma = crop["blur_sigma"][crop["blur_sigma"] > 0]
        assert sigma.min() >= 0.1
        assert sigma.max() <= 2.0
        assert abs(sigma.mean() - 1.05) < 0.05
        _, counts = np.unique(crop["order"][jittered], axis=0, return_counts=True)
        assert len(counts) == 24
        assert np.allclose(counts / jittered.sum(), 1 / 24, atol=0.008)
        assert (crop["order"][~jittered] == np.arange(4)).all()
    # The views of one image are drawn apart.
    assert abs((first["flip"] == second["flip"]).mean() - 0.5) < 0.02
    assert abs(np.corrcoef(first["factors"][:, 0], second["factors"][:, 0])[0, 1]) < 0.03


def test_each_view_has_the_augmentation_asked_for() -> None:
    rows = np.arange(500)
    nothing = Augmentation(flip_prob=0, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    flipped = Augmentation(flip_prob=1, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    drawn = augmentations(3, 1, rows, [1, 2, 3], [nothing, flipped, Augmentation()])
    alone = augmentations(3, 1, rows, [3], [Augmentation()])
    assert drawn["flip"][:500].sum() == 0
    assert drawn["flip"][500:1000].all()
    assert all((drawn[name][:1000] == 0).all() for name in ("hue", "grayscale", "blur_sigma", "solarize"))
    assert all(np.array_equal(drawn[name][1000:], values) for name, values in alone.items())
