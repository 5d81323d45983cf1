import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.boxes import filter_proposals, filter_table, jitter_box, jitter_boxes, nms, pairwise_iou
from orl_fast.config import ViewsConfig
from orl_fast.philox import uniform
from orl_fast.tables import BoxTable


def plain_iou(a, b):
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union else 0.0


def plain_filter(boxes, min_side_px, max_aspect, max_iou, max_rois):
    """The definition, box by box, in Python numbers."""
    kept = []
    for row, box in enumerate(boxes):
        w, h = box[2] - box[0], box[3] - box[1]
        if w <= 0 or h <= 0 or w < min_side_px or h < min_side_px or w / h > max_aspect or h / w > max_aspect:
            continue
        if kept and max(plain_iou(boxes[k], box) for k in kept) > max_iou:
            continue
        kept.append(row)
    return kept[:max_rois] or [0]


def random_boxes(rng, num, *, side=640, empty=0.1, repeated=0.2):
    """Boxes of all sizes, some without area, some twice, some a nudge away from another."""
    corners = rng.integers(0, side, (num, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    flat = rng.random(num) < empty
    boxes[flat, 2] = boxes[flat, 0]
    again = np.flatnonzero(rng.random(num) < repeated)
    boxes[again] = boxes[rng.integers(0, num, len(again))]
    nudged = np.flatnonzero(rng.random(num) < repeated)
    boxes[nudged] += rng.integers(0, 3, (len(nudged), 1)) * np.array([0, 0, 1, 1])
    return boxes.astype(np.int16)


def test_filter_equals_the_definition_on_ten_thousand_cases():
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        num = int(rng.integers(1, 40))
        boxes = random_boxes(rng, num, side=int(rng.choice([8, 60, 300, 3000])))
        limits = {
            "min_side_px": int(rng.choice([1, 2, 20, 96])),
            "max_aspect": float(rng.choice([1.0, 1.5, 3.0])),
            "max_iou": float(rng.choice([0.0, 0.25, 1 / 3, 0.5, 0.75, 1.0])),
            "max_rois": int(rng.choice([1, 3, 100])),
        }
        assert filter_proposals(boxes, **limits).tolist() == plain_filter(boxes.tolist(), **limits), (boxes.tolist(), limits)


def test_filter_keeps_a_box_that_overlaps_by_exactly_the_limit():
    boxes = np.array([[0, 0, 100, 100], [0, 0, 200, 100], [0, 0, 199, 100]], np.int16)
    assert filter_proposals(boxes).tolist() == [0, 1]


@pytest.mark.parametrize("boxes", [np.empty((0, 4)), np.zeros((3, 5)), np.zeros(4)])
def test_filter_refuses_no_boxes(boxes):
    with pytest.raises(ValueError, match="boxes"):
        filter_proposals(boxes)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_filter_of_a_table_is_the_filter_of_each_image(num_threads):
    rng = np.random.default_rng(1)
    lists = [random_boxes(rng, int(num)) if num else np.empty((0, 4), np.int16) for num in rng.integers(0, 60, 50)]
    heights, widths = rng.integers(300, 700, 50).astype(np.int32), rng.integers(300, 700, 50).astype(np.int32)
    proposals = BoxTable.from_lists(lists)
    rois = filter_table(proposals, heights=heights, widths=widths, min_side_px=50, max_rois=5, num_threads=num_threads)
    for image, boxes in enumerate(lists):
        frame = [widths[image], heights[image]] * 2
        boxes = np.clip(boxes, 0, frame) if len(boxes) else np.array([[0, 0, *frame[:2]]])
        kept = plain_filter(boxes.tolist(), 50, 3.0, 0.5, 5)
        assert rois.of(image).tolist() == boxes[kept].tolist()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("num", [0, 1, 31, 32, 33, 500])
def test_nms_equals_torchvision(num, kind):
    rng = np.random.default_rng(num)
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        boxes = random_boxes(rng, num).astype(kind) + (rng.random((num, 4)) < 0.5) * kind(0.25) if num else np.empty((0, 4), kind)
        boxes = boxes.astype(kind)
        boxes[rng.random(num) < 0.05] *= -1  # turned inside out
        scores = rng.integers(0, 20, num).astype(kind)  # many ties
        scores[rng.random(num) < 0.02] = np.nan
        expected = torchvision.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
        assert nms(boxes, scores, threshold).tolist() == expected.tolist()


def test_nms_wants_a_score_for_each_box():
    with pytest.raises(ValueError, match="one score per box"):
        nms(np.zeros((3, 4), np.float32), np.zeros(2), 0.5)


def test_pairwise_iou_equals_the_definition():
    rng = np.random.default_rng(2)
    a, b = random_boxes(rng, 20), random_boxes(rng, 30)
    expected = [[plain_iou(x, y) for y in b.tolist()] for x in a.tolist()]
    assert pairwise_iou(a, b).tolist() == expected
    assert pairwise_iou(a.astype(np.float32), b.astype(np.float32)).dtype == np.float32
    assert pairwise_iou(a, a[:0]).shape == (20, 0)


def plain_jitter(box, height, width, *, min_iou, seed, image, attempts=200):
    """The reference's loop, in Python numbers; None where every attempt fails."""
    x1, y1, x2, y2 = box
    box_w, box_h = x2 - x1, y2 - y1
    for attempt in range(attempts):
        draws = [uniform(seed, 3, image, 7, 4 * attempt + i) for i in range(4)]
        area = box_w * box_h * (0.5 + 1.5 * draws[0])
        ratio = math.exp(math.log(0.5) + (math.log(2.0) - math.log(0.5)) * draws[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        x = round(x1 + 0.5 * box_w + (draws[2] - 0.5) * box_w - 0.5 * w)
        y = round(y1 + 0.5 * box_h + (draws[3] - 0.5) * box_h - 0.5 * h)
        new = (x, y, x + w, y + h)
        inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height and w > 0 and h > 0
        if inside and (min_iou is None or plain_iou(box, new) > min_iou):
            return new
    return None


@pytest.mark.parametrize("compat", ["official", "paper"])
def test_jitter_equals_the_definition(compat):
    rng = np.random.default_rng(3)
    num = 300
    boxes = random_boxes(rng, num, empty=0, repeated=0)
    boxes[:, 2:] += 1
    sizes = np.stack([boxes[:, 3] + rng.integers(0, 60, num), boxes[:, 2] + rng.integers(0, 60, num)], axis=1).astype(np.int64)
    images = np.arange(num, dtype=np.int64)
    found = jitter_boxes(boxes, sizes=sizes, seed=5, epoch=3, images=images, streams=np.full(num, 7), compat=compat)
    for i, box in enumerate(boxes.tolist()):
        new = plain_jitter(box, *sizes[i], min_iou=0.5 if compat == "official" else None, seed=5, image=i)
        assert found[i].tolist() == list(new or box)
        size = {"height_px": int(sizes[i, 0]), "width_px": int(sizes[i, 1])}
        assert jitter_box(box, **size, seed=5, epoch=3, image=i, stream=7, compat=compat).tolist() == found[i].tolist()


@settings(max_examples=200, deadline=None)
@given(corner=st.tuples(*[st.integers(0, 50)] * 2), size=st.tuples(*[st.integers(1, 90)] * 2), seed=st.integers(0, 2**32 - 1))
def test_jitter_stays_inside_and_near(corner, size, seed):
    (x, y), (w, h), right = corner, size, seed % 40
    box = [x, y, x + w, y + h]
    new = jitter_box(box, height_px=y + h + 10, width_px=x + w + right, seed=seed).tolist()
    assert min(new[:2]) >= 0
    assert new[2] <= x + w + right
    assert new[3] <= y + h + 10
    assert new == box or plain_iou(box, new) > 0.5


def test_jitter_returns_the_box_where_nothing_fits():
    views = ViewsConfig(roi_area=(4.0, 5.0))
    assert jitter_box([0, 0, 50, 40], height_px=40, width_px=50, seed=0, views=views).tolist() == [0, 0, 50, 40]
