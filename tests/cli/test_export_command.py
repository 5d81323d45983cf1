"""`orl-fast export` and `import` as commands."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner, Result

from benchmarks.untrained import write_untrained
from orl_fast.checkpoint import read_checkpoint, write_checkpoint
from orl_fast.cli.main import cli
from orl_fast.errors import ConfigError, DataError, MissingStageError, OrlFastError
from orl_fast.models import Encoder, load_encoder, open_encoder
from orl_fast.recipe import load_config


def _run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, ["-q", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit | OrlFastError):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with ResNet-18, whose target network differs from the online one."""
    folder = tmp_path_factory.mktemp("run")
    write_untrained(folder / "checkpoint.pt", load_config("demo", overrides=["backbone=resnet18"]))
    values = dict(read_checkpoint(folder / "checkpoint.pt"))
    model, optimizer = values.pop("model"), values.pop("optimizer")
    model |= {key.replace("online.", "target."): value + 1 for key, value in model.items()}
    write_checkpoint(folder / "checkpoint.pt", values, model=model, optimizer=optimizer)
    return folder


def backbone_of(run: Path) -> Encoder:
    return Encoder(load_encoder(run).backbone, None, name="resnet18")


def test_a_runs_online_backbone_is_exported_and_loads_as_printed(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "weights.pth"
    result = _run("export", run, "--to", "torchvision", "--out", out)
    assert result.exit_code == 0
    assert "(resnet18, 44.8 MB); loaded by torchvision" in result.output
    assert f'load_state_dict(torch.load("{out}", weights_only=True), strict=False)  # all but fc.weight, fc.bias' in result.output
    model = torchvision.models.resnet18()
    assert model.load_state_dict(torch.load(out, weights_only=True), strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert torch.equal(model.layer4[1].conv2.weight, load_encoder(run).backbone.get_parameter("layer4.1.conv2.weight"))


def test_the_target_network_is_exported_on_request(run: Path, tmp_path: Path) -> None:
    assert _run("export", run, "--prefix", "target", "--to", "safetensors", "--out", tmp_path / "t.safetensors").exit_code == 0
    found = open_encoder(tmp_path / "t.safetensors").encoder.backbone.get_parameter("conv1.weight")
    assert torch.equal(found, load_encoder(run).backbone.get_parameter("conv1.weight") + 1)
    opened = open_encoder(run, prefix="target")
    assert (opened.prefix, opened.encoder.mining) == ("model.target.backbone.", load_encoder(run).mining)


@pytest.mark.parametrize("target", ["torchvision", "timm", "detectron2", "mmdet", "safetensors"])
def test_export_and_import_lose_nothing(target: str, run: Path, tmp_path: Path) -> None:
    if target == "timm":
        pytest.importorskip("timm")
    there, back = tmp_path / "there.pkl", tmp_path / "back.safetensors"
    assert _run("export", run, "--to", target, "--out", there).exit_code == 0
    result = _run("import", there, "--out", back)
    assert result.exit_code == 0
    assert open_encoder(back).encoder.fingerprint == backbone_of(run).fingerprint
    again = tmp_path / "again.pkl"
    assert _run("export", back, "--to", target, "--out", again).exit_code == 0
    if target == "detectron2":
        assert again.read_bytes() == there.read_bytes()


def test_imports_keep_the_architecture_that_was_named(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    torch.save(
        {"teacher": {f"backbone.{key}": value for key, value in timm.create_model(name).state_dict().items()}}, tmp_path / "dino.pth"
    )
    assert isinstance(_run("import", tmp_path / "dino.pth", "--out", tmp_path / "x.safetensors").exception, DataError)
    assert _run("import", tmp_path / "dino.pth", "--backbone", f"timm/{name}", "--out", tmp_path / "x.safetensors").exit_code == 0
    assert open_encoder(tmp_path / "x.safetensors").encoder.name == f"timm/{name}"


def test_what_cannot_be_exported_is_explained_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: tuple[tuple[tuple[str | Path, ...], type[OrlFastError], str], ...] = (
        ((tmp_path / "none", "--to", "timm"), MissingStageError, "there is no such file"),
        ((run, "--to", "timm", "--backbone", "resnet50"), ConfigError, "its backbone is resnet18, not resnet50"),
        ((run, "--to", "timm", "--prefix", "nothing"), ConfigError, "nothing of resnet18 under --prefix 'nothing'"),
        (("random", "--to", "timm"), ConfigError, "Name one with --backbone"),
        (("random", "--to", "torchvision", "--backbone", "resnet10_small"), ConfigError, "torchvision has no resnet10_small"),
    )
    for arguments, error, message in wrong:
        result = _run("export", *arguments, "--out", out)
        assert isinstance(result.exception, error)
        assert message in str(result.exception)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": os.getcwd}))
    result = _run("import", tmp_path / "w.pkl", "--out", out)
    assert "wants to call posix.getcwd" in str(result.exception)
    result = _run("export", run, "--to", "safetensors", "--out", run / "checkpoint.pt")
    assert result.exit_code == 2
    assert "is the file that is read" in result.output
    assert load_encoder(run).name == "resnet18"
    assert not out.exists()


@pytest.mark.parametrize("verb", ["export", "import"])
def test_who_looks_for_mined_tables_is_shown_the_way(verb: str) -> None:
    result = _run(verb, "pairs", "pairs.json", "coco")
    assert result.exit_code == 2
    assert f"for mined tables: orl-fast tables {verb} pairs pairs.json coco" in result.output


def test_evaluations_record_the_network_that_was_chosen(run: Path, tmp_path: Path) -> None:
    opened = open_encoder(run, prefix="target")
    assert json.loads(json.dumps(opened.origin)) == {
        "checkpoint": "checkpoint.pt",
        "method": "byol",
        "step": 0,
        "prefix": "model.target.backbone.",
    }
