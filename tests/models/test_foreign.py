"""Backbones out of the files of other toolkits: in the layouts that they write, and refused where they are not whole."""

import argparse
import logging
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError
from orl_fast.models import Encoder, build_backbone, open_encoder
from orl_fast.models.foreign import detectron2_name, load_foreign

State = dict[str, Tensor]

# Detectron2's names, as its converter of torchvision's ResNets writes them, next to torchvision's: some of each kind in a ResNet-50.
_DETECTRON2 = """
conv1.weight stem.conv1.weight
bn1.weight stem.conv1.norm.weight
bn1.bias stem.conv1.norm.bias
bn1.running_mean stem.conv1.norm.running_mean
bn1.running_var stem.conv1.norm.running_var
bn1.num_batches_tracked stem.conv1.norm.num_batches_tracked
layer1.0.conv1.weight res2.0.conv1.weight
layer1.0.bn1.weight res2.0.conv1.norm.weight
layer1.0.bn1.bias res2.0.conv1.norm.bias
layer1.0.conv2.weight res2.0.conv2.weight
layer1.0.bn2.running_mean res2.0.conv2.norm.running_mean
layer1.0.conv3.weight res2.0.conv3.weight
layer1.0.bn3.running_var res2.0.conv3.norm.running_var
layer1.0.downsample.0.weight res2.0.shortcut.weight
layer1.0.downsample.1.weight res2.0.shortcut.norm.weight
layer1.0.downsample.1.bias res2.0.shortcut.norm.bias
layer1.0.downsample.1.running_mean res2.0.shortcut.norm.running_mean
layer1.0.downsample.1.running_var res2.0.shortcut.norm.running_var
layer1.2.conv3.weight res2.2.conv3.weight
layer2.0.conv2.weight res3.0.conv2.weight
layer2.0.downsample.0.weight res3.0.shortcut.weight
layer2.0.downsample.1.bias res3.0.shortcut.norm.bias
layer2.3.bn2.weight res3.3.conv2.norm.weight
layer3.0.conv1.weight res4.0.conv1.weight
layer3.0.downsample.1.running_var res4.0.shortcut.norm.running_var
layer3.5.conv1.weight res4.5.conv1.weight
layer3.5.bn1.bias res4.5.conv1.norm.bias
layer4.0.conv3.weight res5.0.conv3.weight
layer4.0.downsample.0.weight res5.0.shortcut.weight
layer4.2.conv3.weight res5.2.conv3.weight
layer4.2.bn3.weight res5.2.conv3.norm.weight
layer4.2.bn3.running_mean res5.2.conv3.norm.running_mean
"""


@pytest.fixture(scope="module")
def resnet18() -> State:
    return weights("resnet18", 1)


def weights(name: str, seed: int) -> State:
    """A state_dict of torchvision's or timm's classifier, head included, with numbers in its batch norms that are not the initial ones."""
    torch.manual_seed(seed)
    if name.startswith("timm/"):
        model: nn.Module = pytest.importorskip("timm").create_model(name.removeprefix("timm/"))
    else:
        model = torchvision.models.get_model(name, weights=None)
    state: State = model.state_dict()
    return {key: value + 0.1 * torch.rand_like(value) if value.is_floating_point() else value + seed for key, value in state.items()}


def encoder_of(state: Mapping[str, Tensor], name: str = "resnet18") -> Encoder:
    backbone = build_backbone(name)
    own = {key: state[key.removeprefix("trunk.")] for key in backbone.state_dict()}
    backbone.load_state_dict(own)
    return Encoder(backbone, None, name=name)


def under(prefix: str, state: Mapping[str, Tensor], *, head: str = "fc") -> State:
    return {prefix + key.replace("fc.", f"{head}."): value for key, value in state.items()}


def bare(state: Mapping[str, Tensor]) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def sequential(state: Mapping[str, Tensor]) -> State:
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {".".join([places[key.split(".")[0]], *key.split(".")[1:]]): value for key, value in bare(state).items()}


def detectron2(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {detectron2_name(key): value.numpy() for key, value in bare(state).items()}


# What toolkits save of a network `a`; `b` is another one of the same architecture, which must not be taken.
FILES: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "torchvision": (lambda a, b: a, ""),
    "torchvision's training script": (
        lambda a, b: {"model": a, "optimizer": {"state": {0: {"momentum_buffer": a["conv1.weight"]}}}},
        "model.",
    ),
    "state_dict": (lambda a, b: {"state_dict": a, "epoch": 3}, "state_dict."),
    "DataParallel": (lambda a, b: {"state_dict": under("module.", a)}, "state_dict.module."),
    "torch.compile": (lambda a, b: under("_orig_mod.", a), "_orig_mod."),
    "timm's average": (lambda a, b: {"state_dict": b, "state_dict_ema": a, "args": argparse.Namespace(x=1)}, "state_dict_ema."),
    "mmselfsup": (
        lambda a, b: {"meta": {}, "state_dict": under("backbone.", bare(a)) | {"neck.0.weight": b["fc.weight"]}},
        "state_dict.backbone.",
    ),
    "OpenSelfSup, extracted": (lambda a, b: {"state_dict": bare(a), "author": "OpenSelfSup"}, "state_dict."),
    "OpenSelfSup's BYOL": (
        lambda a, b: {"state_dict": under("online_net.0.", bare(a)) | under("target_net.0.", bare(b)) | under("backbone.", bare(a))},
        "state_dict.backbone.",
    ),
    "MoCo v2": (
        lambda a, b: {
            "arch": "resnet18",
            "state_dict": under("module.encoder_q.", a, head="fc.0") | under("module.encoder_k.", b) | {"module.queue": torch.zeros(4, 4)},
        },
        "state_dict.module.encoder_q.",
    ),
    "MoCo v3": (
        lambda a, b: {"state_dict": under("module.momentum_encoder.", b) | under("module.base_encoder.", a)},
        "state_dict.module.base_encoder.",
    ),
    "SwAV": (lambda a, b: under("module.", bare(a)) | {"module.prototypes.weight": b["fc.weight"]}, "module."),
    "solo-learn": (lambda a, b: {"state_dict": under("momentum_backbone.", bare(b)) | under("backbone.", bare(a))}, "state_dict.backbone."),
    "Lightning Bolts": (
        lambda a, b: {"state_dict": under("encoder.", a) | {"projection.model.0.weight": b["fc.weight"]}},
        "state_dict.encoder.",
    ),
    "lightly": (
        lambda a, b: {"state_dict": under("backbone_momentum.", sequential(b)) | under("backbone.", sequential(a))},
        "state_dict.backbone.",
    ),
    "BYOL": (lambda a, b: under("target_encoder.", b) | under("online_encoder.", a), "online_encoder."),
    "DINO": (
        lambda a, b: {
            "student": under("module.backbone.", bare(b)),
            "teacher": under("backbone.", bare(a)) | {"head.mlp.0.bias": b["fc.bias"]},
        },
        "teacher.backbone.",
    ),
    "DINO's student alone": (lambda a, b: {"student": under("module.backbone.", bare(a))}, "student.module.backbone."),
    "VISSL": (
        lambda a, b: {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", bare(a))}}}},
        "classy_state_dict.base_model.model.trunk._feature_blocks.",
    ),
    "Detectron2": (lambda a, b: {"model": detectron2(a), "__author__": "x", "matching_heuristics": True}, "model."),
    "Detectron2's detector": (
        lambda a, b: {"model": {f"backbone.bottom_up.{k}": v for k, v in detectron2(a).items()}},
        "model.backbone.bottom_up.",
    ),
    "orl-fast, format 1": (
        lambda a, b: {"format": 1, "model": under("online.backbone.", bare(a)) | under("target.backbone.", bare(b))},
        "model.online.backbone.",
    ),
}


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="orl_fast")
    return caplog


@pytest.mark.parametrize("kind", FILES)
def test_toolkits_files_give_the_network_that_was_meant(kind: str, resnet18: State, tmp_path: Path) -> None:
    write, prefix = FILES[kind]
    content = write(resnet18, weights("resnet18", 2))
    if kind.startswith("Detectron2"):
        (tmp_path / "w").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "w")
    found = load_foreign(tmp_path / "w", backbone="resnet18")
    assert found.prefix == prefix
    assert found.encoder.fingerprint == encoder_of(resnet18).fingerprint


@pytest.mark.parametrize("name", ["resnet10_small", "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_resnets_are_known_by_their_shapes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name)
    torch.save({f"encoder.{key}": value for key, value in backbone.state_dict().items()}, tmp_path / "w.pth")
    found = load_foreign(tmp_path / "w.pth").encoder
    assert (found.name, found.fingerprint) == (name, Encoder(backbone, None, name=name).fingerprint)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/resnet18"])
def test_timms_models_under_timms_names(name: str, tmp_path: Path) -> None:
    student, teacher = weights(name, 1), weights(name, 2)
    torch.save({"student": under("module.backbone.", student), "teacher": under("backbone.", teacher)}, tmp_path / "dino.pth")
    found = load_foreign(tmp_path / "dino.pth", backbone=name)
    assert found.encoder.fingerprint == encoder_of(teacher, name).fingerprint
    chosen = load_foreign(tmp_path / "dino.pth", backbone=name, prefix="student")
    assert (chosen.prefix, chosen.encoder.fingerprint) == ("student.module.backbone.", encoder_of(student, name).fingerprint)
    save_file(teacher, tmp_path / "model.safetensors")
    assert load_foreign(tmp_path / "model.safetensors", backbone=name).encoder.fingerprint == found.encoder.fingerprint


def test_detectron2s_names_are_those_of_its_converter() -> None:
    table = dict(line.split() for line in _DETECTRON2.split("\n") if line)
    assert {name: detectron2_name(name) for name in table} == table
    ours = list(build_backbone("resnet50").state_dict())
    assert set(table) <= set(ours)
    theirs = [detectron2_name(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert {name.split(".")[0] for name in theirs} == {"stem", "res2", "res3", "res4", "res5"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, resnet18: State, tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in resnet18.items()}
    torch.save(state, tmp_path / "w.pth")
    found = load_foreign(tmp_path / "w.pth").encoder
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(found.backbone.get_parameter("conv1.weight"), state["conv1.weight"].float())
    assert f"converted from {str(dtype).removeprefix('torch.')}" in messages.text


def test_old_files_lack_the_counters_of_batches(resnet18: State, tmp_path: Path) -> None:
    state = {key: value for key, value in resnet18.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    found = load_foreign(tmp_path / "w.pth").encoder
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(images), encoder_of(resnet18)(images))


def test_what_is_left_is_told_by_name(resnet18: State, tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    extra = {"module.queue": torch.zeros(2), "module.decoder.0.weight": torch.zeros(2), "other.weight": torch.zeros(2)}
    torch.save({"state_dict": under("module.", resnet18) | extra}, tmp_path / "w.pth")
    load_foreign(tmp_path / "w.pth")
    assert "resnet18 under 'state_dict.module.', 120 tensors" in messages.text
    assert "not used: queue, decoder.0" in messages.text
    assert "heads, not used: fc (2)" in messages.text


@pytest.mark.parametrize("backbone", [None, "resnet18"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer3.1.bn2.running_var"), r"missing: layer3\.1\.bn2\.running_var"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
            r"another shape or kind: conv1\.weight \[64, 3, 3, 3\] in place of \[64, 3, 7, 7\]",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.zeros(64, dtype=torch.int64)}),
            r"another shape or kind: bn1\.weight \[64\] int64 in place of \[64\]",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.ones(64).to_sparse()}),
            r"another shape or kind: bn1\.weight \[64\] sparse_coo in place of \[64\]",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.ones(64, device="meta")}),
            r"another shape or kind: bn1\.weight \[64\] without values \(meta\) in place of \[64\]",
        ),
        (lambda s: s.update({"layer4.2.conv1.weight": torch.zeros(3)}), r"not of this architecture: layer4\.2\.conv1\.weight"),
    ],
)
def test_a_backbone_is_whole_or_refused(
    backbone: str | None, change: Callable[[State], Any], message: str, resnet18: State, tmp_path: Path
) -> None:
    state = dict(resnet18)
    change(state)
    torch.save({"state_dict": under("module.", state)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=message):
        load_foreign(tmp_path / "w.pth", backbone=backbone)


def test_weights_of_another_architecture_are_refused(resnet18: State, tmp_path: Path) -> None:
    torch.save(resnet18, tmp_path / "18.pth")
    torch.save(weights("resnet34", 1), tmp_path / "34.pth")
    with pytest.raises(DataError, match=r"does not fit resnet34; missing: layer1\.2\.conv1\.weight.* and \d+ more"):
        load_foreign(tmp_path / "18.pth", backbone="resnet34")
    with pytest.raises(DataError, match=r"does not fit resnet18; not of this architecture: layer1\.2\.conv1\.weight"):
        load_foreign(tmp_path / "34.pth", backbone="resnet18")
    with pytest.raises(DataError, match=r"nothing, or almost nothing, of convnext_tiny in it; it holds conv1.weight"):
        load_foreign(tmp_path / "18.pth", backbone="convnext_tiny")
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"architecture is not known: name it with --backbone.* It holds a.weight"):
        load_foreign(tmp_path / "other.pth")
    torch.save(torch.ones(2), tmp_path / "single.pth")
    with pytest.raises(DataError, match="a single tensor without a name"):
        load_foreign(tmp_path / "single.pth")
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        load_foreign(tmp_path / "18.pth", backbone="resnet_18")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, resnet18: State, tmp_path: Path) -> None:
    torch.save(resnet18 | {"layer1.0.bn1.bias": torch.full((64,), value)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"not finite \(layer1\.0\.bn1\.bias\)"):
        load_foreign(tmp_path / "w.pth")


def test_of_several_networks_the_choice_is_told_and_can_be_another(
    resnet18: State, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    other, load = weights("resnet18", 2), partial(load_foreign, backbone="resnet18")
    torch.save({"state_dict": under("module.encoder_q.", resnet18) | under("module.encoder_k.", other)}, tmp_path / "moco.pth")
    load(tmp_path / "moco.pth")
    assert "taking 'state_dict.module.encoder_q.'; also there: 'state_dict.module.encoder_k.' (--prefix)" in messages.text
    for prefix in ("encoder_k", "module.encoder_k", "state_dict.module.encoder_k."):
        assert load(tmp_path / "moco.pth", prefix=prefix).encoder.fingerprint == encoder_of(other).fingerprint
    with pytest.raises(ConfigError, match=r"nothing of resnet18 under --prefix 'encoder'; there are 'state_dict.module.encoder_q.'"):
        load(tmp_path / "moco.pth", prefix="encoder")
    with pytest.raises(
        ConfigError, match=r"nothing under --prefix 'encoder'; it holds state_dict.module.encoder_q, state_dict.mod.*encoder_k$"
    ):
        load_foreign(tmp_path / "moco.pth", prefix="encoder")
    torch.save({"a": resnet18, "b": other}, tmp_path / "two.pth")
    with pytest.raises(ConfigError, match=r"holds several backbones \('a\.', 'b\.'\); choose one with --prefix"):
        load(tmp_path / "two.pth")
    assert load(tmp_path / "two.pth", prefix="b").encoder.fingerprint == encoder_of(other).fingerprint
    torch.save({"a": resnet18, "b": resnet18}, tmp_path / "same.pth")
    assert load(tmp_path / "same.pth").prefix == "a."
    torch.save(resnet18 | under("momentum.", other), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth").prefix == ""
    assert load(tmp_path / "bare.pth", prefix="").encoder.fingerprint == encoder_of(resnet18).fingerprint
    assert load(tmp_path / "bare.pth", prefix="momentum").encoder.fingerprint == encoder_of(other).fingerprint


def test_of_several_architectures_one_has_to_be_named(resnet18: State, tmp_path: Path) -> None:
    larger = weights("resnet34", 1)
    torch.save({"teacher": larger, "student": resnet18}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"holds several architectures \(resnet18, resnet34\); name one with --backbone"):
        load_foreign(tmp_path / "w.pth")
    assert load_foreign(tmp_path / "w.pth", backbone="resnet18").prefix == "student."
    assert load_foreign(tmp_path / "w.pth", prefix="student").encoder.fingerprint == encoder_of(resnet18).fingerprint
    assert load_foreign(tmp_path / "w.pth", prefix="teacher").encoder.name == "resnet34"


def test_opening_tells_where_weights_come_from(resnet18: State, tmp_path: Path) -> None:
    torch.save({"state_dict": under("backbone.", resnet18)}, tmp_path / "w.pth")
    opened = open_encoder(tmp_path / "w.pth")
    assert opened.path == tmp_path / "w.pth"
    assert opened.origin == {"checkpoint": "w.pth", "method": None, "step": None, "prefix": "state_dict.backbone."}
    assert open_encoder("random", backbone="resnet18").origin == {"checkpoint": None, "method": None, "step": None, "prefix": None}
    state = torch.random.get_rng_state()
    load_foreign(tmp_path / "w.pth")
    assert torch.equal(torch.random.get_rng_state(), state)
