"""Backbones: torchvision's classifiers without their pooling and classifier, from random weights."""

import copy
import difflib
from collections import OrderedDict

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1

from orl_fast.errors import ConfigError

_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Flatten, nn.Linear)
_PROBE_PX = 224
SMALL_RESNET = "resnet10_small"


class Backbone(nn.Sequential):
    """Images [B, 3, H, W], normalized floats → feature map [B, num_features, h, w].

    Its children bear torchvision's names, so a ResNet's `state_dict()` is what torchvision, detectron2 and others load.
    """

    num_features: int


def build_backbone(name: str) -> Backbone:
    """The trunk of a torchvision classifier, randomly initialized; nothing is downloaded.

    ResNets: convolutions Kaiming-normal fan-in, batch norm weight 1, no zero-init residual (ORL, appendix A). Others keep
    torchvision's own initialization, which belongs to their design.

    Args:
        name: "resnet10_small" (below), "resnet18" … "resnet152", "convnext_tiny", … (`torchvision.models.list_models()`).
    Raises:
        ConfigError: no such model (the nearest name is given), or one that gives no feature map (vision transformers).
    """
    if name == SMALL_RESNET:
        return _small_resnet()
    known = [SMALL_RESNET, *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "for example resnet50"
        raise ConfigError(f"model.backbone = {name!r}: torchvision has no such classifier; {hint}")
    # GoogLeNet and Inception warn about their slow default initialization unless told.
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    backbone = _trunk(model)
    backbone.num_features = _num_features(backbone, name)
    if isinstance(model, torchvision.models.ResNet):
        init_kaiming(backbone)
    return backbone


def _small_resnet() -> Backbone:
    """A ResNet for views of 32 to 64 px and minutes of CPU time: one block per stage, 16 to 128 channels, a 3 × 3 stem, no max pooling."""
    stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
    layer1 = nn.Sequential(BasicBlock(16, 16))
    backbone = Backbone(OrderedDict(conv1=stem, bn1=nn.BatchNorm2d(16), relu=nn.ReLU(inplace=True), layer1=layer1))
    for stage, channels in ((2, 32), (3, 64), (4, 128)):
        shortcut = nn.Sequential(conv1x1(channels // 2, channels, stride=2), nn.BatchNorm2d(channels))
        block = BasicBlock(channels // 2, channels, stride=2, downsample=shortcut)
        backbone.add_module(f"layer{stage}", nn.Sequential(block))
    backbone.num_features = 128
    init_kaiming(backbone)
    return backbone


def init_kaiming(module: nn.Module) -> None:
    """Kaiming-normal, fan-in, for all convolutions and linear layers: std = sqrt(2 / fan_in); biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _trunk(model: nn.Module) -> Backbone:
    """The children up to the pooling; torchvision lists them in the order in which `forward` calls them."""
    trunk = Backbone()
    for name, child in model.named_children():
        if isinstance(child, _POOLING) or name in ("classifier", "head", "heads"):
            break
        trunk.add_module(name, child)
    if isinstance(model, torchvision.models.DenseNet):
        trunk.add_module("relu", nn.ReLU(inplace=True))  # the model's forward applies it as a function
    return trunk


def _num_features(backbone: Backbone, name: str) -> int:
    """The channels of the feature map, found by a forward pass without arithmetic (meta device)."""
    try:
        _, num_features, _, _ = copy.deepcopy(backbone).to("meta").eval()(torch.empty(1, 3, _PROBE_PX, _PROBE_PX, device="meta")).shape
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"model.backbone = {name!r}: gives no feature map [B, C, h, w]; use a convolutional one, for example resnet50"
        ) from error
    return int(num_features)
