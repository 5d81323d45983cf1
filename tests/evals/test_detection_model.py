"""The detector: the specification's structure, and its anchors, RoIs and losses against formulas and loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orl_fast.errors import ConfigError
from orl_fast.evals.detection_data import Example
from orl_fast.evals.detection_model import (
    Detector,
    box_losses,
    build_detector,
    cut_masks,
    mask_loss,
    pad_images,
    parameter_groups,
    pyramid_levels,
)  # fmt: skip
from orl_fast.models import build_backbone
from orl_fast.views.normalize import normalize


def small_detector(*, masks: bool = True, num_classes: int = 2) -> Detector:
    torch.manual_seed(0)
    return build_detector(build_backbone("resnet10_small"), num_classes=num_classes, masks=masks, width=16, rois_per_image=16)


def example(seed: int, *, size_px: tuple[int, int] = (64, 64)) -> Example:
    generator = torch.Generator().manual_seed(seed)
    width, height = size_px
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 8:32, 4:28] = masks[1, 30:60, 34:60] = 1
    boxes = torch.tensor([[4.0, 8, 28, 32], [34, 30, 60, 60]])
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return Example(image, boxes, torch.tensor([1, 2]), masks)


def test_a_resnet50_gets_the_specified_heads_and_all_of_it_is_trained() -> None:
    detector = build_detector(build_backbone("resnet50"), num_classes=80, masks=True)
    norms = {name for name, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d)}
    counts = [
        sum(name.startswith(part) for name in norms) for part in ("backbone.body", "backbone.fpn", "rpn", "roi_heads.box", "roi_heads.mask")
    ]
    assert counts == [53, 8, 0, 4, 4]
    assert detector.training
    assert all(parameter.requires_grad for parameter in detector.parameters())
    box_head = [module for module in detector.roi_heads.box_head.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [(type(module), module.weight.shape[0]) for module in box_head] == [(nn.Conv2d, 256)] * 4 + [(nn.Linear, 1024)]
    assert detector.roi_heads.box_predictor.cls_score.weight.shape == (81, 1024)
    assert detector.roi_heads.mask_predictor.mask_fcn_logits.weight.shape == (81, 256, 1, 1)
    block = detector.backbone.body.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    assert pyramid_levels(build_backbone("resnet50"), "resnet50") == ([4, 8, 16, 32], [256, 512, 1024, 2048])
    groups = parameter_groups(detector, weight_decay=1e-4)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0]
    assert len(groups[1]["params"]) == 2 * 69
    assert {id(value) for group in groups for value in group["params"]} == {id(value) for value in detector.parameters()}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_other_backbones_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: detection takes ResNets"):
        build_detector(build_backbone(name), num_classes=2, masks=True, name=name)


def test_images_are_normalized_and_padded_with_the_mean() -> None:
    images = [example(0, size_px=(70, 64)).image, example(1, size_px=(64, 90)).image]
    padded = pad_images(images)
    assert padded.tensors.shape == (2, 3, 96, 96)
    assert padded.image_sizes == [(64, 70), (90, 64)]
    assert torch.equal(padded.tensors[0, :, :64, :70], normalize(images[0][None])[0])
    assert not padded.tensors[0, :, 64:].any()
    assert not padded.tensors[1, :, :, 64:].any()


def test_anchors_are_eight_strides_wide_at_exact_strides() -> None:
    detector = build_detector(build_backbone("resnet18"), num_classes=2, masks=False, width=8)
    sides = (800, 1088)  # of which torchvision's fifth level has strides of 61 and 64 px
    maps = [torch.zeros(1, 8, math.ceil(sides[0] / stride), math.ceil(sides[1] / stride)) for stride in (4, 8, 16, 32, 64)]
    images = pad_images([torch.zeros(3, *sides, dtype=torch.uint8)] * 2)
    anchors = detector.rpn.anchor_generator(images, maps)
    assert len(anchors) == 2
    expected = []
    for stride, features in zip((4, 8, 16, 32, 64), maps, strict=True):
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                for aspect in (0.5, 1, 2):
                    width = 8 * stride / math.sqrt(aspect)
                    x, y, height = column * stride, row * stride, aspect * width
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    assert torch.allclose(anchors[0], torch.tensor(expected), atol=1e-3)


def test_rois_are_pooled_from_detectron2s_level_at_exact_places() -> None:
    detector = build_detector(build_backbone("resnet18"), num_classes=2, masks=True, width=8)
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 600, (300, 2)), np.exp(rng.uniform(np.log(8), np.log(1200), (300, 2)))
    boxes = torch.from_numpy(np.concatenate([corner, corner + size], axis=1)).float()
    pool = detector.roi_heads.box_roi_pool
    expected = np.clip(np.floor(4 + np.log2(np.sqrt(size.prod(1)) / 224 + 1e-8)), 2, 5) - 2
    assert pool.levels(boxes).tolist() == expected.tolist()
    # Every pixel holds the image coordinate of its own center, so a RoI's mean is the box's center.
    sides = [(512 // stride, 512 // stride) for stride in (4, 8, 16, 32)]
    maps = {str(i): ((torch.arange(side) + 0.5) * 512 / side).expand(1, 8, side, side).contiguous() for i, (side, _) in enumerate(sides)}
    inner = torch.tensor([[100.0, 120, 133, 160], [64, 64, 200, 260], [40, 40, 440, 400], [201.5, 90, 203, 95]])
    pooled = pool(maps, [inner], [])
    assert torch.allclose(pooled.mean(dim=(1, 2, 3)), (inner[:, 0] + inner[:, 2]) / 2, atol=0.05)


def test_losses_are_finite_and_reach_every_parameter() -> None:
    for masks in (True, False):
        detector = small_detector(masks=masks)
        examples = [example(seed) if masks else example(seed)._replace(masks=None) for seed in range(2)]
        losses = detector(examples, [5, 6])
        names = ["loss_box_reg", "loss_classifier", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
        assert sorted(losses) == [name for name in names if masks or name != "loss_mask"]
        torch.stack(list(losses.values())).sum().backward()
        assert [name for name, value in detector.named_parameters() if value.grad is None] == []
        again = small_detector(masks=masks)(examples, [5, 6])
        assert all(torch.equal(losses[name], again[name]) for name in losses)


def test_the_box_loss_of_proposals_is_the_mean_absolute_difference() -> None:
    rpn = small_detector().rpn
    rpn.fg_bg_sampler.seeds = [1, 2]
    generator = torch.Generator().manual_seed(0)
    deltas, targets = torch.randn(80, 4, generator=generator), torch.randn(80, 4, generator=generator)
    objectness = torch.randn(80, 1, generator=generator)
    labels = torch.randint(-1, 2, (80,), generator=generator).float()  # fewer than are sampled, so that all are
    classification, boxes = rpn.compute_loss(objectness, deltas, list(labels.split(40)), list(targets.split(40)))
    counted = [i for i in range(80) if labels[i] >= 0]
    absolute = sum(float((deltas[i] - targets[i]).abs().sum()) for i in counted if labels[i] == 1)
    entropy = sum(math.log1p(math.exp(float(-objectness[i] if labels[i] == 1 else objectness[i]))) for i in counted)
    assert float(boxes) == pytest.approx(absolute / len(counted), rel=1e-5)
    assert float(classification) == pytest.approx(entropy / len(counted), rel=1e-5)


def test_the_losses_of_the_heads_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(12, 3, generator=generator), torch.randn(12, 12, generator=generator)
    labels, wanted = torch.randint(0, 3, (12,), generator=generator), torch.randn(12, 4, generator=generator)
    losses = box_losses(logits, deltas, labels, wanted)
    entropy = sum(float(logits[i].logsumexp(0) - logits[i, labels[i]]) for i in range(12)) / 12
    absolute = sum(float((deltas[i, 4 * k : 4 * k + 4] - wanted[i]).abs().sum()) for i, k in enumerate(labels.tolist()) if k) / 12
    assert float(losses["loss_classifier"]) == pytest.approx(entropy, rel=1e-5)
    assert float(losses["loss_box_reg"]) == pytest.approx(absolute, rel=1e-5)
    masks, cut = torch.randn(5, 3, 28, 28, generator=generator), torch.randint(0, 2, (5, 28, 28), generator=generator).float()
    own = torch.stack([masks[i, labels[i]] for i in range(5)])
    expected = -(cut * own.sigmoid().log() + (1 - cut) * (1 - own.sigmoid()).log()).mean()
    assert float(mask_loss(masks, labels[:5], cut)) == pytest.approx(float(expected), rel=1e-5)


def test_masks_to_learn_are_cut_out_of_their_boxes() -> None:
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[1, 10:38, 20:34] = 1
    rois = torch.tensor([[20.0, 10, 48, 38], [6, 10, 62, 38], [20, 10, 48, 38]])
    cut = cut_masks(masks, torch.tensor([1, 1, 0]), rois)
    expected = torch.zeros(3, 28, 28)
    expected[0, :, :14] = 1  # pixel by pixel
    expected[1, :, 7:14] = 1  # two pixels for one
    assert torch.equal(cut, expected)


@pytest.mark.parametrize("masks", [True, False])
def test_detections_are_at_most_100_within_the_image_and_the_best_first(masks: bool) -> None:
    detector = small_detector(masks=masks).eval()
    with torch.inference_mode():
        found: list[Any] = detector([example(0, size_px=(64, 80)), example(1)])
    for each, (width, height) in zip(found, [(64, 80), (64, 64)], strict=True):
        assert 0 < len(each.boxes) == len(each.scores) <= 100
        assert (each.boxes >= 0).all()
        assert (each.boxes <= torch.tensor([width, height, width, height])).all()
        assert each.scores.tolist() == sorted(each.scores.tolist(), reverse=True)
        assert set(each.labels.tolist()) <= {1, 2}
        assert each.masks.shape == (len(each.boxes), 28, 28) if masks else each.masks is None


def test_boxes_are_computed_in_float32_under_bfloat16() -> None:
    detector = small_detector().eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([example(0)])
    assert (found.boxes.dtype, found.scores.dtype) == (torch.float32, torch.float32)
    assert not torch.equal(found.boxes, found.boxes.bfloat16().float())
