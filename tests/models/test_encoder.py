from pathlib import Path

import pytest
import torch

from orl_fast.config import Config, ModelConfig, config_to_dict
from orl_fast.errors import DataError, MissingStageError
from orl_fast.models import Branch, load_encoder
from orl_fast.models.encoder import CHECKPOINT_FORMAT, random_encoder

CONFIG = Config(model=ModelConfig(backbone="resnet18", projector_hidden=16, projector_out=8, predictor_hidden=16))


def _save(path: Path, branch: Branch, **changes: object) -> Path:
    values: dict[str, object] = {
        "format": CHECKPOINT_FORMAT, "method": "byol", "step": 3, "config": config_to_dict(CONFIG), "index": "f00", "mined": {},
        "model": {f"online.{key}": value for key, value in branch.state_dict().items()}, "optimizer": {}, "versions": {"torch": "x"},
    }  # fmt: skip
    torch.save(values | changes, path)
    return path


def test_loads_the_online_branch(tmp_path: Path) -> None:
    torch.manual_seed(1)
    branch = Branch(CONFIG.model).train()
    images = torch.randn(4, 3, 64, 64)
    branch(images)  # moves the running statistics, which eval mode uses
    path = _save(tmp_path / "checkpoint.pt", branch)
    state = torch.random.get_rng_state()
    encoder = load_encoder(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    branch.eval()
    with torch.no_grad():
        features = branch.backbone(images)
        assert torch.equal(encoder.backbone(images), features)
        assert torch.equal(encoder.pooled(images), features.mean(dim=(2, 3)))
        assert torch.equal(encoder.projected(images), branch(images))
    assert encoder.config == CONFIG
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert load_encoder(tmp_path).fingerprint == encoder.fingerprint


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    branch = Branch(CONFIG.model)
    first = load_encoder(_save(tmp_path / "a.pt", branch)).fingerprint
    assert load_encoder(_save(tmp_path / "b.pt", branch, step=9)).fingerprint == first
    with torch.no_grad():
        branch.backbone.get_parameter("conv1.weight")[0, 0, 0, 0] += 1e-3
    assert load_encoder(_save(tmp_path / "c.pt", branch)).fingerprint != first
    assert random_encoder(CONFIG).fingerprint == random_encoder(CONFIG).fingerprint != first


def test_missing_and_damaged_checkpoints_are_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="run orl-fast train"):
        load_encoder(tmp_path / "checkpoint.pt")
    whole = _save(tmp_path / "checkpoint.pt", Branch(CONFIG.model)).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for name, content in {"cut": whole[:-1000], "flipped": bytes(flipped), "empty": b"", "text": b"no checkpoint"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            load_encoder(tmp_path / name)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="not a checkpoint of orl-fast"):
        load_encoder(tmp_path / "other.pt")
    with pytest.raises(DataError, match="checkpoint format 99"):
        load_encoder(_save(tmp_path / "later.pt", Branch(CONFIG.model), format=99))
