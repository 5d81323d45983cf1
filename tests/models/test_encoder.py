"""Encoders out of checkpoints, without the method that trained them."""

from pathlib import Path

import pytest
import torch

from orl_fast.checkpoint import write_checkpoint
from orl_fast.config import Config, MiningConfig, ModelConfig
from orl_fast.errors import DataError, MissingStageError
from orl_fast.models import Network, load_encoder, random_encoder
from orl_fast.models.encoder import is_finite
from orl_fast.recipe import config_to_dict

CONFIG = Config(model=ModelConfig(backbone="resnet18", projector_hidden=16, projector_out=8), mining=MiningConfig(crop_px=64))


def _network() -> Network:
    torch.manual_seed(1)
    return Network("resnet18", (16, 8))


def _save(path: Path, network: Network, *, prefix: str = "online.", **changes: object) -> Path:
    header: dict[str, object] = {
        "method": "a method of the future", "step": 3, "num_steps": 9, "config": config_to_dict(CONFIG), "index": "f00", "mined": {},
        "renderer": "cpu", "encoder": {**network.description, "prefix": prefix}, "versions": {"torch": "x"},
    }  # fmt: skip
    model = {f"{prefix}{key}": value for key, value in network.state_dict().items()} | {"queue": torch.zeros(3)}
    write_checkpoint(path, header | changes, model=model, optimizer={})
    return path


@pytest.mark.parametrize("prefix", ["online.", "module.student."])
def test_it_is_rebuilt_from_the_checkpoint_alone(prefix: str, tmp_path: Path) -> None:
    network = _network().train()
    images = torch.randn(4, 3, 64, 64)
    network(images)  # moves the running statistics, which eval mode uses
    path = _save(tmp_path / "checkpoint.pt", network, prefix=prefix)
    state = torch.random.get_rng_state()
    encoder = load_encoder(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    network.eval()
    with torch.no_grad():
        features = network.backbone(images)
        assert torch.equal(encoder.backbone(images), features)
        assert torch.equal(encoder.pooled(images), features.mean(dim=(2, 3)))
        assert torch.equal(encoder(images), encoder.pooled(images))
        assert torch.equal(encoder.projected(images), network(images))
        assert torch.equal(encoder.levels(images)[-1], features)
    assert encoder.mining == CONFIG.mining
    assert encoder.num_features == 512
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert load_encoder(tmp_path).fingerprint == encoder.fingerprint


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    network = _network()
    first = load_encoder(_save(tmp_path / "a.pt", network)).fingerprint
    assert load_encoder(_save(tmp_path / "b.pt", network, step=9)).fingerprint == first
    with torch.no_grad():
        network.backbone.get_parameter("conv1.weight")[0, 0, 0, 0] += 1e-3
    assert load_encoder(_save(tmp_path / "c.pt", network)).fingerprint != first
    assert random_encoder(CONFIG).fingerprint == random_encoder(CONFIG).fingerprint != first


def test_what_cannot_be_rebuilt_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="run orl-fast train"):
        load_encoder(tmp_path / "checkpoint.pt")
    network = _network()
    other = {**network.description, "prefix": "online."}
    for wrong in (
        {**other, "backbone": "resnet34"},
        {**other, "prefix": "offline."},
        {"prefix": "online."},
        {**other, "backbone": "no such"},
    ):
        with pytest.raises(DataError, match="does not fit this version of orl-fast"):
            load_encoder(_save(tmp_path / "other.pt", network, encoder=wrong))
    with torch.no_grad():
        network.backbone.get_buffer("bn1.running_var")[0] = torch.inf
    with pytest.raises(DataError, match="not finite; use an earlier checkpoint"):
        load_encoder(_save(tmp_path / "inf.pt", network))


def test_only_finite_floats_are_finite() -> None:
    good = {
        "weights": torch.ones(3),
        "count": torch.tensor(2),
        "empty": torch.empty(0),
        "step": 3,
        "nested": [{"momentum": torch.zeros(2)}],
    }
    assert is_finite(good)
    for bad in (torch.tensor([1.0, torch.nan]), torch.tensor(-torch.inf), torch.tensor([torch.inf], dtype=torch.bfloat16)):
        assert not is_finite(good | {"nested": [{"m": bad}]})
    assert is_finite({})
