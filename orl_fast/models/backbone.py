"""Backbones from random weights: torchvision's classifiers without their pooling and classifier, and timm's where it is installed."""

import copy
import difflib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.ops import Permute

from orl_fast.errors import ConfigError

_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Flatten, nn.Linear)
_PROBE_PX = 224
_NUM_LEVELS = 5
SMALL_RESNET = "resnet10_small"
TIMM = "timm/"
_NO_MAP = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)  # what models raise for sizes that they cannot take


class Backbone(nn.Sequential):
    """Images [B, 3, H, W], normalized floats → feature map [B, num_features, h, w].

    Its children bear torchvision's names, so a ResNet's `state_dict()` is what torchvision, detectron2 and others load.
    """

    num_features: int

    def require_size(self, size_px: int, *, setting: str) -> None:
        """Refuse square images that are too small for the model or no multiple of its patches: a ConfigError that names the `setting`."""
        try:
            _feature_map(self, size_px)
        except _NO_MAP as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{setting} = {size_px}: too small for the backbone, or no multiple of its patches ({reason}); use another size"
            ) from error

    def levels(self, images: Tensor) -> list[Tensor]:
        """Feature maps of several depths: the last one of each resolution, at most five, the deepest last.

        Of a ResNet: conv1 after its ReLU, layer1, layer2, layer3, layer4.
        """
        found: list[Tensor] = []
        features, channels_first = images, True
        for layer in _layers(self):
            features = layer(features)
            if isinstance(layer, Permute):  # Swin computes [B, h, w, C] within
                channels_first = not channels_first
            level = features if channels_first else features.permute(0, 3, 1, 2)
            if found and level.shape[2:] == found[-1].shape[2:]:
                found.pop()
            found.append(level)
        return found[-_NUM_LEVELS:]


class TimmBackbone(Backbone):
    """A model of timm, vision transformers included: their tokens, without class and register tokens, are laid out as a map."""

    trunk: Any

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f"model.backbone = {TIMM + name!r}: timm is not installed; pip install 'orl-fast[timm]'") from error
        known = timm.list_models()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {TIMM + near[0]!r}?" if near else f"for example {TIMM}vit_small_patch16_224"
            raise ConfigError(f"model.backbone = {TIMM + name!r}: timm has no such model; {hint}")
        options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "global_pool": ""}
        try:
            self.trunk = timm.create_model(name, dynamic_img_size=True, **options)  # views of other sizes than it was made for
        except TypeError:  # not a model with position embeddings
            self.trunk = timm.create_model(name, **options)
        self.num_features = int(self.trunk.num_features)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.trunk.forward_features(images)
        if features.ndim == 3:  # [B, tokens, C]
            patch_px, patches = self.trunk.patch_embed.patch_size, features[:, self.trunk.num_prefix_tokens :].transpose(1, 2)
            return patches.reshape(*patches.shape[:2], images.shape[2] // patch_px[0], images.shape[3] // patch_px[1])
        return features if features.shape[1] == self.num_features else features.permute(0, 3, 1, 2)

    def levels(self, images: Tensor) -> list[Tensor]:
        """One map of each resolution; of a vision transformer, evenly spaced blocks."""
        found: list[Tensor] = self.trunk.forward_intermediates(images, norm=True, output_fmt="NCHW", intermediates_only=True)
        by_size = {features.shape[2:]: features for features in found}
        if len(by_size) > 1:
            return list(by_size.values())[-_NUM_LEVELS:]
        return [found[(i + 1) * len(found) // _NUM_LEVELS - 1] for i in range(_NUM_LEVELS)]


def build_backbone(name: str) -> Backbone:
    """The trunk of a classifier, randomly initialized; nothing is downloaded.

    torchvision's ResNets: convolutions Kaiming-normal fan-in, batch norm weight 1, no zero-init residual (ORL, appendix A). Others keep
    their library's own initialization, which belongs to their design.

    Args:
        name: "resnet10_small" (below), "resnet18" … "resnet152", "convnext_tiny", … (`torchvision.models.list_models()`), or
            "timm/NAME" for any of timm's, for example "timm/vit_small_patch16_224".
    Raises:
        ConfigError: no such model (the nearest name is given), or one that gives no feature map.
    """
    if name.startswith(TIMM):
        timm_backbone = TimmBackbone(name.removeprefix(TIMM))
        _probe(timm_backbone, name)
        return timm_backbone
    if name == SMALL_RESNET:
        return _small_resnet()
    known = [SMALL_RESNET, *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"for example resnet50, or {TIMM}NAME for a model of timm"
        raise ConfigError(f"model.backbone = {name!r}: torchvision has no such classifier; {hint}")
    # GoogLeNet and Inception warn about their slow default initialization unless it is asked for.
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    backbone = trunk(model)
    backbone.num_features = _probe(backbone, name)
    if isinstance(model, torchvision.models.ResNet):
        init_kaiming(backbone)
    return backbone


def resnet_skeletons() -> Iterator[tuple[str, Backbone]]:
    """All ResNets that `build_backbone` knows, without memory (on the meta device): their names and shapes."""
    models = torchvision.models
    names = [name for name in models.list_models(module=models) if models.get_model_builder(name).__module__ == models.ResNet.__module__]
    for name in (SMALL_RESNET, *names):
        with torch.device("meta"):
            yield name, _small_resnet() if name == SMALL_RESNET else trunk(models.get_model(name, weights=None))


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


def trunk(model: nn.Module) -> Backbone:
    """The children of torchvision's classifier up to the pooling; torchvision lists them in the order in which `forward` calls them."""
    found = Backbone()
    for name, child in model.named_children():
        if isinstance(child, _POOLING) or name in ("classifier", "head", "heads"):
            break
        found.add_module(name, child)
    if isinstance(model, torchvision.models.DenseNet):
        found.add_module("relu", nn.ReLU(inplace=True))  # the model's forward applies it as a function
    return found


def _probe(backbone: Backbone, name: str) -> int:
    """The channels of the feature map; freezes parameters that do not reach the map.

    timm keeps some of a head's; distributed training waits for the gradient of all that is to be learned.
    """
    try:
        num_features, probe = _feature_map(backbone, _PROBE_PX)
    except _NO_MAP as error:
        raise ConfigError(
            f"model.backbone = {name!r}: gives no feature map [B, C, h, w] at {_PROBE_PX} px; use a convolutional one, for example "
            f"resnet50, or a transformer of timm, for example {TIMM}vit_small_patch16_224"
        ) from error
    for parameter, probed in zip(backbone.parameters(), probe.parameters(), strict=True):
        parameter.requires_grad_(probed.grad is not None)
    return num_features


def _feature_map(backbone: Backbone, size_px: int) -> tuple[int, nn.Module]:
    """The channels of the map of an image, from a pass and a backward pass without arithmetic, of a copy on the meta device."""
    copied = copy.deepcopy(backbone).to("meta").eval().requires_grad_(True)
    features = copied(torch.empty(1, 3, size_px, size_px, device="meta"))
    _, num_features, _, _ = features.shape
    features.sum().backward()
    return int(num_features), copied


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """What is called one after the other, nested sequences unfolded."""
    for child in module.children():
        if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
            yield from _layers(child)
        else:
            yield child
