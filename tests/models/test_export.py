"""Exports: what other toolkits load gives the same features, and every file comes back as it was."""

import pickle
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor

from orl_fast.cli.export import TARGETS as OFFERED
from orl_fast.errors import ConfigError, DataError
from orl_fast.models import Encoder, build_backbone, export, onnx_model, open_encoder
from orl_fast.models.export import TARGETS, export_backbone
from orl_fast.models.foreign import load_foreign


def encoder_of(name: str, seed: int = 0) -> Encoder:
    """A backbone whose batch norms have statistics and weights of their own, so that mixing any two of them up shows."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(seed)
    backbone = build_backbone(name)
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand_like(value) * 0.5 + (0.5 if key.endswith(("weight", "var")) else 0))
            elif key.endswith("num_batches_tracked"):
                value.fill_(seed + 7)
    return Encoder(backbone, None, name=name)


def images(size_px: int = 96) -> Tensor:
    return torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "densenet121"])
def test_torchvision_loads_all_but_the_classifier_and_gives_the_same_features(name: str, tmp_path: Path) -> None:
    encoder, out = encoder_of(name), tmp_path / "weights.pth"
    done = export_backbone(encoder, "torchvision", out, source="here")
    assert "the same features, bit for bit" in done.checked
    assert done.num_bytes == out.stat().st_size
    model = torchvision.models.get_model(name, weights=None).eval()
    missing, unexpected = model.load_state_dict(torch.load(out, weights_only=True), strict=False)
    head = "classifier" if name == "densenet121" else "fc"
    assert (set(missing), unexpected) == ({f"{head}.weight", f"{head}.bias"}, [])
    setattr(model, head, torch.nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(model(images()), encoder(images()), rtol=0, atol=0 if name.startswith("resnet") else 1e-6)
    assert load_foreign(out, backbone=None if name.startswith("resnet") else name).encoder.fingerprint == encoder.fingerprint


def test_the_printed_lines_load_it(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    encoder = encoder_of("resnet18")
    for target in ("torchvision", "timm", "safetensors"):
        done = export_backbone(encoder, target, tmp_path / target, source="here")
        names = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors, "images": images()}
        exec("\n".join(done.loading), names)
        model = names["model"]
        assert isinstance(model, torch.nn.Module)
        for key, value in encoder.backbone.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("densenet121", "densenet121"),
        ("efficientnet_b0", "efficientnet_b0"),
        ("mobilenet_v2", "mobilenetv2_100"),
        ("timm/resnet18", "resnet18"),
        ("timm/vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("timm/convnext_atto", "convnext_atto"),
    ],
)
def test_timm_loads_everything_and_gives_the_same_features(name: str, theirs: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    encoder, out = encoder_of(name), tmp_path / "weights.pth"
    export_backbone(encoder, "timm", out, source="here")
    model = timm.create_model(theirs, num_classes=0).eval()
    model.load_state_dict(torch.load(out, weights_only=True))
    with torch.no_grad():
        features = model.forward_features(images(224))
        if name.startswith("timm/vit"):  # [B, 1 + 196, C]
            features = features[:, 1:].transpose(1, 2).reshape(2, -1, 14, 14)
        assert torch.equal(features, encoder.backbone(images(224)))
    back = load_foreign(out, backbone=f"timm/{theirs}").encoder
    assert torch.equal(back.backbone(images(224)), encoder.backbone(images(224)))
    if name.startswith("timm/"):
        assert back.fingerprint == encoder.fingerprint


@pytest.mark.parametrize(
    ("target", "name"),
    [(target, name) for target in ("detectron2", "mmdet", "safetensors") for name in ("resnet10_small", "resnet18")]
    + [("detectron2", "resnet34"), ("detectron2", "resnet50"), ("mmdet", "resnet50"), ("safetensors", "densenet121")],
)
def test_files_come_back_as_they_were(target: str, name: str, tmp_path: Path) -> None:
    encoder, out = encoder_of(name), tmp_path / "weights.pkl"
    done = export_backbone(encoder, target, out, source="here")
    assert "read back: the same weights, bit for bit" in done.checked
    known = None if target == "safetensors" else name
    assert open_encoder(out, backbone=known).encoder.fingerprint == encoder.fingerprint


def test_detectron2_gets_arrays_in_its_scheme(tmp_path: Path) -> None:
    """Names and shapes as Detectron2's ResNet-50 has them, written down from its documentation; the others follow by their blocks."""
    out = tmp_path / "weights.pkl"
    encoder = encoder_of("resnet50")
    export_backbone(encoder, "detectron2", out, source="here")
    content = pickle.loads(out.read_bytes())
    assert {key: content[key] for key in ("__author__", "matching_heuristics")} == {"__author__": "orl-fast", "matching_heuristics": True}
    expected = {"stem.conv1.weight": (64, 3, 7, 7), **{f"stem.conv1.norm.{part}": (64,) for part in ("weight", "bias", "running_mean")}}
    for stage, blocks, width in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        for block in range(blocks):
            inside = 4 * width if block else (64 if stage == 2 else 2 * width)
            shapes = {"conv1": (width, inside, 1, 1), "conv2": (width, width, 3, 3), "conv3": (4 * width, width, 1, 1)}
            shapes |= {} if block else {"shortcut": (4 * width, inside, 1, 1)}
            for layer, shape in shapes.items():
                expected[f"res{stage}.{block}.{layer}.weight"] = shape
                for part in ("weight", "bias", "running_mean", "running_var"):
                    expected[f"res{stage}.{block}.{layer}.norm.{part}"] = shape[:1]
    weights = content["model"]
    assert all(isinstance(value, np.ndarray) for value in weights.values())
    assert {name: weights[name].shape for name in expected} == expected
    rest = {name for name in weights if name not in expected}
    assert all(name == "stem.conv1.norm.running_var" or name.endswith(".norm.num_batches_tracked") for name in rest)
    np.testing.assert_array_equal(weights["res4.0.shortcut.norm.bias"], encoder.backbone.get_parameter("layer3.0.downsample.1.bias"))


def test_mmdet_gets_a_prefix(tmp_path: Path) -> None:
    encoder = encoder_of("resnet18")
    export_backbone(encoder, "mmdet", tmp_path / "w.pth", source="here")
    state = torch.load(tmp_path / "w.pth", weights_only=True)["state_dict"]
    taken = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}  # as mmengine does
    assert len(taken) == len(state)
    assert torchvision.models.resnet18().load_state_dict(taken, strict=False).missing_keys == ["fc.weight", "fc.bias"]


def test_safetensors_say_what_they_hold(tmp_path: Path) -> None:
    encoder = encoder_of("timm/vit_tiny_patch16_224")
    export_backbone(encoder, "safetensors", tmp_path / "w.safetensors", source="runs/coco/orl")
    with safe_open(tmp_path / "w.safetensors", "pt") as opened:
        metadata = opened.metadata()
        assert "blocks.0.attn.qkv.weight" in opened.keys()  # noqa: SIM118  not a mapping
    assert {key: metadata[key] for key in ("architecture", "source", "format")} == {
        "architecture": encoder.name,
        "source": "runs/coco/orl",
        "format": "pt",
    }
    assert load_foreign(tmp_path / "w.safetensors").encoder.fingerprint == encoder.fingerprint  # without --backbone


def test_onnx_runtime_gives_the_same_features_for_any_batch_and_size(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    encoder, out = encoder_of("resnet10_small"), tmp_path / "w.onnx"
    done = export_backbone(encoder, "onnx", out, source="here", size_px=64)
    assert "the same features up to rounding; batch and image size are free" in done.checked
    session = onnxruntime.InferenceSession(str(out))
    for shape in ((2, 3, 64, 64), (1, 3, 64, 64), (5, 3, 80, 112)):
        given = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        features, feature_map = session.run(None, {"images": given.numpy()})
        np.testing.assert_allclose(features, encoder.pooled(given).numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(feature_map, encoder.backbone(given).numpy(), rtol=1e-4, atol=1e-3)
    model = onnx.load(str(out))
    onnx.checker.check_model(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["architecture"], metadata["mean"]) == ("resnet10_small", "(0.485, 0.456, 0.406)")
    assert [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]


def test_onnx_has_fixed_sizes_where_torch_cannot_free_them_and_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    exported = onnx_model._exported

    def fixed_alone(features: torch.nn.Module, size_px: int, *, is_free: bool, metadata: Mapping[str, str]) -> bytes:
        if is_free:
            raise RuntimeError("sides are specialized")
        return exported(features, size_px, is_free=is_free, metadata=metadata)

    monkeypatch.setattr(onnx_model, "_exported", fixed_alone)
    model = onnx_model.OnnxModel.export(encoder_of("resnet10_small"), source="here", size_px=32)
    assert (model.is_free, model.size) == (False, "32, 32")
    assert "the batch is free, images have 32 × 32 px" in model.check()
    other = replace(model, features=onnx_model._Features(encoder_of("resnet10_small", seed=1).backbone).eval())
    with pytest.raises(DataError, match="ONNX Runtime gives other features"):
        other.check()
    monkeypatch.setattr(onnx_model, "_exported", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match=r"torch cannot export resnet10_small to ONNX \(division by zero\)"):
        onnx_model.OnnxModel.export(encoder_of("resnet10_small"), source="here", size_px=32)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("resnet10_small", "torchvision", "torchvision has no resnet10_small"),
        ("resnet10_small", "timm", "timm has no resnet10_small"),
        ("convnext_tiny", "timm", "timm's convnext_tiny has other weights than torchvision's"),
        ("densenet121", "detectron2", "Detectron2 gets torchvision's ResNets, not densenet121"),
        ("timm/vit_tiny_patch16_224", "mmdet", "MMDetection gets torchvision's ResNets, not timm/vit_tiny"),
        ("timm/vit_tiny_patch16_224", "torchvision", "torchvision has no timm/vit_tiny_patch16_224"),
    ],
)
def test_what_a_toolkit_does_not_have_is_refused(name: str, target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_backbone(encoder_of(name), target, tmp_path / "w", source="here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "target", "extra"), [("timm", "timm", "timm"), ("onnx", "onnx", "onnx"), ("onnxscript", "onnx", "onnx")]
)
def test_missing_packages_are_named(module: str, target: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("resnet18")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module} is not installed; pip install 'orl-fast\[{extra}\]'"):
        export_backbone(encoder, target, tmp_path / "w", source="here")


@pytest.mark.parametrize("target", ["torchvision", "safetensors"])
def test_a_file_that_does_not_give_the_same_is_not_left(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, save, to_safetensors = encoder_of("resnet18"), export._saved, safetensors.torch.save

    def damaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {"layer4.0.conv1.weight": -state["layer4.0.conv1.weight"]}

    monkeypatch.setattr(export, "_saved", lambda state: save(damaged(state)))
    monkeypatch.setattr(safetensors.torch, "save", lambda state, metadata: to_safetensors(damaged(state), metadata))
    with pytest.raises(DataError, match=r"gives other features \(they differ by|does not give back the weights"):
        export_backbone(encoder, target, tmp_path / "out", source="here")
    assert not list(tmp_path.iterdir())


def test_the_table_of_targets_is_the_commands() -> None:
    assert list(TARGETS) == list(OFFERED)
