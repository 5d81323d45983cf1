import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

from orl_fast.errors import ConfigError
from orl_fast.models import build_backbone

# One of each family whose forward is more than a chain of its children, and whose pooling is a module that can be watched.
_WATCHED = {
    "resnet18": "avgpool",
    "convnext_tiny": "avgpool",
    "efficientnet_b0": "avgpool",
    "regnet_y_400mf": "avgpool",
    "mobilenet_v3_small": "avgpool",
    "swin_t": "avgpool",
}
# Channels and, at 96 px, the sides of the maps of all depths.
_LEVELS = {
    "resnet18": [(64, 48), (64, 24), (128, 12), (256, 6), (512, 3)],
    "resnet10_small": [(16, 48), (32, 24), (64, 12), (128, 6)],
    "densenet121": [(64, 48), (128, 24), (256, 12), (512, 6), (1024, 3)],
    "regnet_y_400mf": [(32, 48), (48, 24), (104, 12), (208, 6), (440, 3)],
    "mobilenet_v3_small": [(16, 48), (16, 24), (24, 12), (48, 6), (576, 3)],
    "shufflenet_v2_x0_5": [(24, 48), (24, 24), (48, 12), (96, 6), (1024, 3)],
    "squeezenet1_1": [(64, 47), (128, 23), (256, 11), (512, 5)],
    "convnext_tiny": [(96, 24), (192, 12), (384, 6), (768, 3)],
    "swin_t": [(96, 24), (192, 12), (384, 6), (768, 3)],
    "timm/resnet18": [(64, 48), (64, 24), (128, 12), (256, 6), (512, 3)],
    "timm/convnext_atto": [(40, 24), (80, 12), (160, 6), (320, 3)],
    "timm/swin_tiny_patch4_window7_224": [(96, 24), (192, 12), (384, 6), (768, 3)],  # NHWC within
    "timm/vit_small_patch16_224": [(384, 6)] * 5,
}


def _images(size_px: int, num: int = 2) -> Tensor:
    return torch.randn(num, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))


def _skip_without_timm(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")


@pytest.mark.parametrize(("name", "pooling"), _WATCHED.items())
def test_trunk_gives_what_torchvisions_model_feeds_its_pooling(name: str, pooling: str) -> None:
    backbone = build_backbone(name).eval()
    model = torchvision.models.get_model(name, weights=None).eval()
    missing, unexpected = model.load_state_dict(backbone.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("fc.", "classifier.", "head.")) for key in missing)
    seen: list[Tensor] = []
    model.get_submodule(pooling).register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        features = backbone(_images(64))
        model(_images(64))
    assert torch.equal(features, seen[0])
    assert features.shape[1] == backbone.num_features


def test_densenets_last_activation_is_kept() -> None:
    backbone = build_backbone("densenet121").eval()
    with torch.no_grad():
        features = backbone(_images(64))
    assert features.shape == (2, 1024, 2, 2)
    assert features.min() == 0


def test_levels_of_a_resnet_are_those_of_its_stages() -> None:
    backbone = build_backbone("resnet18").eval()
    model = torchvision.models.resnet18(weights=None).eval()
    model.load_state_dict(backbone.state_dict(), strict=False)
    seen: list[Tensor] = []
    for layer in (model.relu, model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        found = backbone.levels(_images(64))
        model(_images(64))
    assert len(found) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))


@pytest.mark.parametrize(("name", "expected"), _LEVELS.items())
def test_levels_are_maps_of_every_resolution(name: str, expected: list[tuple[int, int]]) -> None:
    _skip_without_timm(name)
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        found = backbone.levels(_images(96))
        last = backbone(_images(96))
    assert [tuple(level.shape) for level in found] == [(2, channels, side, side) for channels, side in expected]
    torch.testing.assert_close(found[-1], last)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("timm/vit_small_patch16_224", (6, 14)),
        ("timm/resnet18", (3, 7)),
        ("timm/convnext_atto", (3, 7)),
        ("timm/swin_tiny_patch4_window7_224", (3, 7)),
    ],
)
def test_timms_models_give_maps_of_any_view_and_learn_in_all_parameters(name: str, sides: tuple[int, int]) -> None:
    pytest.importorskip("timm")
    backbone = build_backbone(name).train()
    for size_px, side in zip((96, 224), sides, strict=True):
        features = backbone(_images(size_px))
        assert features.shape == (2, backbone.num_features, side, side)
        features.square().mean().backward()
        # What has no gradient would make distributed training wait forever: it must be frozen.
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in backbone.parameters())
        backbone.zero_grad()
    frozen = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert all(key.startswith("trunk.head.") for key in frozen)


def test_a_vits_map_holds_its_patches_in_their_places() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm/vit_small_patch16_224").eval()
    with torch.no_grad():
        tokens = backbone.trunk.forward_features(_images(96))
        features = backbone(_images(96))
    for row, column in ((0, 0), (0, 5), (3, 1), (5, 5)):
        assert torch.equal(features[:, :, row, column], tokens[:, 1 + 6 * row + column])


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "did you mean 'resnet50'"),
        ("timm/vit_smal_patch16_224", "did you mean 'timm/vit_small_patch16_224'"),
        ("nothing at all", "for example resnet50, or timm/NAME"),
        ("vit_b_32", "gives no feature map"),
        ("maxvit_t", "gives no feature map"),
        ("timm/mixer_s16_224", "gives no feature map"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(name: str, message: str) -> None:
    _skip_without_timm(name)
    with pytest.raises(ConfigError, match=message):
        build_backbone(name)


@pytest.mark.parametrize(
    ("name", "size_px", "fits"),
    [
        ("resnet18", 8, True),
        ("densenet121", 16, False),
        ("inception_v3", 32, False),
        ("timm/vit_small_patch16_224", 96, True),
        ("timm/vit_small_patch16_224", 100, False),
    ],
)
def test_images_of_a_size_that_does_not_fit_are_refused(name: str, size_px: int, fits: bool) -> None:
    _skip_without_timm(name)
    backbone = build_backbone(name).eval()
    if fits:
        backbone.require_size(size_px, setting="--size")
        backbone(_images(size_px))
        return
    with pytest.raises(ConfigError, match=rf"--size = {size_px}: too small for the backbone, or no multiple of its patches \("):
        backbone.require_size(size_px, setting="--size")
    with pytest.raises((RuntimeError, AssertionError)):
        backbone(_images(size_px))


def test_without_timm_its_models_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed; pip install 'orl-fast\[timm\]'"):
        build_backbone("timm/resnet18")


def test_building_depends_on_the_seed_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_backbone("shufflenet_v2_x0_5").state_dict()["conv1.0.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_small_resnet_halves_its_map_four_times_and_is_kaiming_normal() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet10_small")
    with torch.no_grad():
        assert backbone(_images(64)).shape == (2, backbone.num_features, 4, 4)
    last = backbone.get_submodule("layer4.0.conv2")
    assert isinstance(last, nn.Conv2d)
    assert last.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.03)
