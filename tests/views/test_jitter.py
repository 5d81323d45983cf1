"""The jittered RoI against the reference's loop, written out in Python numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orl_fast.config import Variant, ViewsConfig
from orl_fast.philox import uniform
from orl_fast.views import JitteredRoi
from orl_fast.views.jitter import jitter_boxes

_WHERE = {"seed": 5, "epoch": 3, "stream": 7}
_Box = tuple[int, int, int, int]


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
def test_it_is_the_references_loop(variant: Variant) -> None:
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
def test_it_stays_inside_and_near(corner: tuple[int, int], size: tuple[int, int], image: int) -> None:
    (x, y), (w, h), right = corner, size, image % 40
    box = (x, y, x + w, y + h)
    sizes = np.array([[y + h + 10, x + w + right]], np.int64)
    new = _jitter(np.array([box], np.int16), sizes, JitteredRoi(), first_image=image)[0].tolist()
    assert min(new[:2]) >= 0
    assert new[2] <= x + w + right
    assert new[3] <= y + h + 10
    assert tuple(new) == box or _iou(box, tuple(new)) > 0.5


def test_it_is_the_box_itself_where_nothing_fits() -> None:
    boxes, sizes = np.array([[0, 0, 50, 40]], np.int16), np.array([[40, 50]], np.int64)
    assert _jitter(boxes, sizes, JitteredRoi(area=(4.0, 5.0))).tolist() == boxes.tolist()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="are expected for 3 images"):
        jitter_boxes(np.zeros((3, 4), np.int16), sizes=np.zeros((2, 2), np.int64), images=np.arange(3), jitter=JitteredRoi(), **_WHERE)
