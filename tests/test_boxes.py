import numpy as np
import pytest
import torch
import torchvision
from plain_boxes import plain_iou, random_boxes

from orl_fast.boxes import filter_proposals, nms, pairwise_iou


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
