"""The draws of a view: torchvision's algorithm for the crop, the reference's for the jittered RoI, the paper's numbers for the rest."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision import transforms

from orl_fast.config import Variant, ViewsConfig
from orl_fast.philox import uniform
from orl_fast.views import Augmentation, JitteredRoi
from orl_fast.views.chance import augmentations, choices, jitter_boxes, random_resized_crops

_NUM, _SEED, _EPOCH, _STREAM = 60, 9, 4, 2
_WHERE = {"seed": 5, "epoch": 3, "stream": 7}
_Box = tuple[int, int, int, int]


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


def _iou(a: _Box, b: _Box) -> float:
    w, h = max(0, min(a[2], b[2]) - max(a[0], b[0])), max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union


def _expected(box: _Box, height: int, width: int, *, image: int, min_iou: float | None) -> _Box:
    x1, y1, x2, y2 = box
    box_w, box_h = x2 - x1, y2 - y1
    for attempt in range(200):
        draws = [uniform(5, 3, image, 7, 4 * attempt + i) for i in range(4)]
        area = box_w * box_h * (0.5 + 1.5 * draws[0])
        ratio = math.exp(math.log(0.5) + (math.log(2.0) - math.log(0.5)) * draws[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        x = round(x1 + 0.5 * box_w + (draws[2] - 0.5) * box_w - 0.5 * w)
        y = round(y1 + 0.5 * box_h + (draws[3] - 0.5) * box_h - 0.5 * h)
        new = (x, y, x + w, y + h)
        inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height and w > 0 and h > 0
        if inside and (min_iou is None or _iou(box, new) > min_iou):
            return new
    return box


def _jitter(boxes: NDArray[np.int16], sizes: NDArray[np.int64], jitter: JitteredRoi, *, first_image: int = 0) -> NDArray[np.int64]:
    return jitter_boxes(boxes, sizes=sizes, images=np.arange(len(boxes)) + first_image, jitter=jitter, **_WHERE)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_a_jittered_roi_is_the_references(variant: Variant) -> None:
    """Its loop, written out in Python numbers."""
    rng, num = np.random.default_rng(3), 300
    corners = np.sort(rng.integers(0, 640, (num, 2, 2)), axis=1).reshape(num, 4)
    boxes = (corners + np.array([0, 0, 1, 1])).astype(np.int16)
    sizes = np.stack([boxes[:, 3] + rng.integers(0, 60, num), boxes[:, 2] + rng.integers(0, 60, num)], axis=1).astype(np.int64)
    found = _jitter(boxes, sizes, JitteredRoi.of(ViewsConfig(), variant))
    min_iou = 0.5 if variant == "official" else None
    for i, (box, (height, width)) in enumerate(zip(boxes.tolist(), sizes.tolist(), strict=True)):
        assert tuple(found[i]) == _expected(tuple(box), height, width, image=i, min_iou=min_iou)
    assert (found != boxes).any(axis=1).mean() > 0.5  # long and narrow ones have none near


@settings(max_examples=200, deadline=None)
@given(corner=st.tuples(*[st.integers(0, 50)] * 2), size=st.tuples(*[st.integers(1, 90)] * 2), image=st.integers(0, 2**32 - 1))
def test_a_jittered_roi_stays_inside_and_near(corner: tuple[int, int], size: tuple[int, int], image: int) -> None:
    (x, y), (w, h), right = corner, size, image % 40
    box = (x, y, x + w, y + h)
    sizes = np.array([[y + h + 10, x + w + right]], np.int64)
    new = _jitter(np.array([box], np.int16), sizes, JitteredRoi(), first_image=image)[0].tolist()
    assert min(new[:2]) >= 0
    assert new[2] <= x + w + right
    assert new[3] <= y + h + 10
    assert tuple(new) == box or _iou(box, tuple(new)) > 0.5


def test_a_jittered_roi_is_the_roi_itself_where_nothing_fits() -> None:
    boxes, sizes = np.array([[0, 0, 50, 40]], np.int16), np.array([[40, 50]], np.int64)
    assert _jitter(boxes, sizes, JitteredRoi(area=(4.0, 5.0))).tolist() == boxes.tolist()


def test_rois_and_sizes_that_differ_in_number_are_refused() -> None:
    with pytest.raises(ValueError, match="are expected for 3 images"):
        jitter_boxes(np.zeros((3, 4), np.int16), sizes=np.zeros((2, 2), np.int64), images=np.arange(3), jitter=JitteredRoi(), **_WHERE)
