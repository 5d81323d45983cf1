import math

import pytest
import torch
import torchvision
from torch import nn

from orl_fast.errors import ConfigError
from orl_fast.models import build_backbone

# One of each family whose forward is more than a chain of its children, and whose pooling is a module that can be watched.
_WATCHED = {
    "resnet18": "avgpool",
    "convnext_tiny": "avgpool",
    "efficientnet_b0": "avgpool",
    "regnet_y_400mf": "avgpool",
    "mobilenet_v3_small": "avgpool",
}


@pytest.mark.parametrize(("name", "pooling"), _WATCHED.items())
def test_trunk_gives_what_torchvisions_model_feeds_its_pooling(name: str, pooling: str) -> None:
    backbone = build_backbone(name).eval()
    model = torchvision.models.get_model(name, weights=None).eval()
    missing, unexpected = model.load_state_dict(backbone.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("fc.", "classifier.")) for key in missing)
    seen: list[torch.Tensor] = []
    model.get_submodule(pooling).register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone(images)
        model(images)
    assert torch.equal(features, seen[0])
    assert features.shape[1] == backbone.num_features


def test_densenets_last_activation_is_kept() -> None:
    backbone = build_backbone("densenet121").eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 1024, 2, 2)
    assert features.min() == 0


def test_resnet_is_kaiming_normal_fan_in() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18")
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = math.sqrt(2 / (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]))
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.03), name
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all(), name
            assert (layer.bias == 0).all(), name


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet50'"):
        build_backbone("resnet5O")


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t"])
def test_models_without_a_feature_map_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="gives no feature map"):
        build_backbone(name)


def test_small_resnet_halves_its_map_four_times_and_is_kaiming_normal() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet10_small")
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, backbone.num_features, 4, 4)
    last = backbone.get_submodule("layer4.0.conv2")
    assert isinstance(last, nn.Conv2d)
    assert last.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.03)
