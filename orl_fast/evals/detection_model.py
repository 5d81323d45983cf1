"""Mask R-CNN with a feature pyramid, from torchvision's parts with the numbers of Detectron2's R50-FPN and the paper's changes.

The changes (paper, appendix; as MoCo's transfer): batch norm in pyramid, box head (4 convolutions, 1 fully connected layer) and mask head,
synchronized over ranks like the backbone's, and nothing frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, boxes, roi_align

from orl_fast.errors import ConfigError
from orl_fast.evals.detection_data import Example
from orl_fast.models import Backbone
from orl_fast.views.normalize import normalize

LEVELS = ("layer1", "layer2", "layer3", "layer4")
SIZE_DIVISOR = 32  # images are padded to multiples
_ANCHOR_STRIDES = 8  # side of a level's anchors: 32 px at stride 4, … 512 px at stride 64
_ASPECTS = (0.5, 1.0, 2.0)
_CANONICAL_PX, _CANONICAL_STRIDE = 224, 16  # a RoI of that size is pooled from the level of that stride (FPN, equation 1)
_BOX_PX, _MASK_PX = 7, 14


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What is found in one image, the best first: boxes [n, 4] xyxy of the resized image, labels [n] from 1, scores, masks [n, h, w]."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None  # probabilities within the box


class Detector(nn.Module):
    """torchvision's GeneralizedRCNN without its transform: examples arrive resized, as bytes; its children bear torchvision's names."""

    def __init__(self, backbone: nn.Module, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, examples: Sequence[Example], seeds: Sequence[int] = ()) -> Any:
        """In training: the losses by name. In eval mode: the `Detections` of each image.

        `seeds`: of each image's random choice of anchors and proposals, so that it does not depend on the others in the batch.
        """
        images = pad_images([each.image for each in examples])
        features = self.backbone(images.tensors)
        if not self.training:
            proposals, _ = self.rpn(images, features)
            found, _ = self.roi_heads(features, proposals, images.image_sizes)
            return [Detections(boxes=each["boxes"], labels=each["labels"], scores=each["scores"], masks=_masks(each)) for each in found]
        for module in (self.rpn, self.roi_heads):
            module.fg_bg_sampler.seeds = seeds
        targets = [
            {"boxes": each.boxes, "labels": each.labels} | ({} if each.masks is None else {"masks": each.masks}) for each in examples
        ]
        proposals, losses = self.rpn(images, features, targets)
        _, more = self.roi_heads(features, proposals, images.image_sizes, targets)
        return {**losses, **more}


def build_detector(
    backbone: Backbone, *, num_classes: int, masks: bool, width: int = 256, rois_per_image: int = 512, name: str = "the backbone"
) -> Detector:
    """A detector of `num_classes` categories on a ResNet, all of it to be trained. ConfigError if the backbone is not a ResNet.

    width: channels of the pyramid and of the heads' convolutions; the fully connected layer has four times as many.
    """
    strides, channels = pyramid_levels(backbone, name)
    norm = nn.BatchNorm2d
    pyramid = BackboneWithFPN(backbone, {level: str(i) for i, level in enumerate(LEVELS)}, channels, width, norm_layer=norm)
    anchors = _Anchors([*strides, 2 * strides[-1]])
    rpn = _Rpn(
        anchors, RPNHead(width, len(_ASPECTS)), 0.7, 0.3, 256, 0.5,
        {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}, 0.7,
    )  # fmt: skip
    rpn.fg_bg_sampler = _Sampler(256, 0.5)
    heads = _RoiHeads(
        _RoiAlign(strides, _BOX_PX), FastRCNNConvFCHead((width, _BOX_PX, _BOX_PX), [width] * 4, [4 * width], norm_layer=norm),
        FastRCNNPredictor(4 * width, num_classes + 1), 0.5, 0.5, rois_per_image, 0.25, None, 0.05, 0.5, 100,
    )  # fmt: skip
    heads.fg_bg_sampler = _Sampler(rois_per_image, 0.25)
    for layer in heads.box_head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    _init_normal(heads.box_predictor.cls_score, std=0.01)
    _init_normal(heads.box_predictor.bbox_pred, std=0.001)
    wide = [rpn.head, heads.box_predictor]
    if masks:
        heads.mask_roi_pool = _RoiAlign(strides, _MASK_PX)
        heads.mask_head = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm)
        heads.mask_predictor = MaskRCNNPredictor(width, width, num_classes + 1)
        nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)
        _init_normal(heads.mask_predictor.mask_fcn_logits, std=0.001)
        wide.append(heads.mask_predictor)
    for module in wide:
        module.register_forward_hook(_to_float32)
    detector = Detector(pyramid, rpn, heads).train()
    detector.requires_grad_(True)
    return detector


def pyramid_levels(backbone: Backbone, name: str) -> tuple[list[int], list[int]]:
    """Stride and channels of the four stages of a ResNet. ConfigError for any other backbone."""
    stages = [getattr(backbone, level, None) for level in LEVELS]
    if not all(isinstance(stage, nn.Sequential) for stage in stages):
        raise ConfigError(f"{name}: detection takes ResNets (layer1 … layer4), for example resnet50; this backbone has other parts")
    sizes: list[torch.Size] = []
    side_px = 8 * SIZE_DIVISOR
    handles = [stage.register_forward_hook(lambda _m, _i, features: sizes.append(features.shape)) for stage in stages if stage is not None]
    training = backbone.training
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, side_px, side_px, device=next(backbone.parameters()).device))
    backbone.train(training)
    for handle in handles:
        handle.remove()
    return [side_px // size[-1] for size in sizes], [size[1] for size in sizes]


def parameter_groups(detector: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Batch norm without weight decay, all else with it (Detectron2's WEIGHT_DECAY_NORM = 0)."""
    layers = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = {id(value) for layer in layers for value in layer.parameters()}
    parameters = list(detector.parameters())
    return [
        {"params": [value for value in parameters if id(value) not in norms], "weight_decay": weight_decay},
        {"params": [value for value in parameters if id(value) in norms], "weight_decay": 0.0},
    ]


def pad_images(images: Sequence[Tensor]) -> ImageList:
    """Normalize images [3, h, w] uint8 and pad them with zeros (the mean color), at the right and below, to one size."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(sides) // SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True))
    padded = [F.pad(normalize(image[None]), (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
    return ImageList(torch.cat(padded), sizes)


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors at exact strides, their sides not rounded; torchvision derives strides from the maps' sizes, 61 instead of 64 at 800 px."""

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(tuple((_ANCHOR_STRIDES * stride,) for stride in strides), (_ASPECTS,) * len(strides))
        self.strides = strides

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        scale, aspect = torch.tensor(scales, dtype=dtype, device=device), torch.tensor(aspect_ratios, dtype=dtype, device=device)
        widths, heights = (scale / aspect.sqrt()), scale * aspect.sqrt()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        strides = [[torch.tensor(stride, device=feature_maps[0].device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(each.shape[-2:]) for each in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class _Rpn(RegionProposalNetwork):  # type: ignore[misc]
    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As torchvision's, with the L1 loss of Detectron2 for the boxes."""
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        difference = pred_bbox_deltas[positive] - torch.cat(regression_targets)[positive]
        return (
            F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled]),
            difference.abs().sum() / len(sampled),
        )


class _RoiHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's, with Detectron2's losses: L1 for boxes, masks cut out by aligned RoIAlign and binarized."""

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        rois, matched, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, rois, image_shapes)))
        losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(wanted))
        if self.has_mask():
            positive = [each > 0 for each in labels]
            rois, matched, labels = ([each[of] for each, of in zip(values, positive, strict=True)] for values in (rois, matched, labels))
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, rois, image_shapes)))
            cut = [cut_masks(each["masks"], of, boxes) for each, of, boxes in zip(targets, matched, rois, strict=True)]
            losses["loss_mask"] = mask_loss(logits, torch.cat(labels), torch.cat(cut))
        return [], losses


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Cross entropy of logits [R, C + 1], and the L1 loss of the right class's deltas [R, 4 (C + 1)] where labels [R] are not 0, over R."""
    positive = torch.where(labels > 0)[0]
    own = deltas.view(len(labels), -1, 4)[positive, labels[positive]]
    return {
        "loss_classifier": F.cross_entropy(logits, labels),
        "loss_box_reg": (own - wanted[positive]).abs().sum() / len(labels),
    }


def cut_masks(masks: Tensor, matched: Tensor, rois: Tensor) -> Tensor:
    """[R, 28, 28] of zeros and ones: the parts of masks [m, H, W] within the boxes [R, 4], of each the mask that `matched` [R] names."""
    numbered = torch.cat([matched[:, None].to(rois.dtype), rois], dim=1)
    cut: Tensor = roi_align(masks[:, None].float(), numbered, 2 * _MASK_PX, aligned=True)[:, 0]
    return (cut >= 0.5).float()


def mask_loss(logits: Tensor, labels: Tensor, cut: Tensor) -> Tensor:
    """Binary cross entropy of the right class's logits, [R, C + 1, 28, 28], against [R, 28, 28]."""
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], cut)


class _RoiAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign of a pyramid with exact strides and aligned pixels; torchvision's is off by half a pixel, and guesses strides from sizes."""

    def __init__(self, strides: Sequence[int], output_px: int) -> None:
        super().__init__([str(i) for i in range(len(strides))], output_px, sampling_ratio=0)
        self.strides = strides

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        del image_shapes
        maps = [x[name] for name in self.featmap_names]
        number = torch.repeat_interleave(torch.tensor([len(each) for each in boxes], device=maps[0].device))
        rois = torch.cat([number[:, None].float(), torch.cat(boxes).float()], dim=1)  # [R, 5]
        levels = self.levels(rois[:, 1:])
        pooled = torch.zeros(len(rois), maps[0].shape[1], *self.output_size, device=rois.device)
        for level, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            aligned = roi_align(features.float(), rois[chosen], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            pooled = pooled.index_put((chosen,), aligned)
        return pooled

    def levels(self, rois: Tensor) -> Tensor:
        """[R]: the level that each box is pooled from."""
        wanted = boxes.box_area(rois).sqrt() / _CANONICAL_PX * _CANONICAL_STRIDE  # a stride
        return torch.floor(torch.log2(wanted / self.strides[0] + 1e-8)).clamp(0, len(self.strides) - 1)


class _Sampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]
    """Chooses for each image by the image's own seed."""

    seeds: Sequence[int] = ()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = []
        for seed, labels in zip(self.seeds, matched_idxs, strict=True):
            torch.manual_seed(seed)
            chosen.append(super().__call__([labels]))
        return [positive for (positive,), _ in chosen], [negative for _, (negative,) in chosen]


def _init_normal(layer: nn.Module, *, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _to_float32(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
    """Boxes have to be computed in float32: bfloat16 has steps of 4 px at 800 px."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_to_float32(_module, _inputs, each) for each in outputs)


def _masks(found: dict[str, Tensor]) -> Tensor | None:
    return found["masks"][:, 0] if "masks" in found else None
