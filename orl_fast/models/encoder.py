"""Trained encoders out of checkpoints, for mining, evaluations and exports: none of them sees a method's class."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orl_fast.checkpoint import checkpoint_path, read_checkpoint
from orl_fast.config import Config, MiningConfig
from orl_fast.errors import ConfigError, DataError
from orl_fast.models.backbone import Backbone, build_backbone
from orl_fast.models.heads import pool
from orl_fast.models.network import Network

_MINING = MiningConfig()


class Encoder(nn.Module):
    """A backbone, with its projector where it has one, in eval mode and without gradients."""

    def __init__(self, backbone: Backbone, projector: nn.Module | None, *, name: str, mining: MiningConfig = _MINING) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.name = name  # from which `build_backbone` builds another
        self.mining = mining  # the sizes that images and RoIs are encoded at, as configured for the run
        self.num_features = backbone.num_features  # channels of the feature map
        self.fingerprint = weights_digest(self)  # tables made with the encoder carry it
        self.requires_grad_(False).eval()

    def pooled(self, images: Tensor) -> Tensor:
        """Normalized float images [B, 3, H, W] → globally average-pooled features [B, C]."""
        return pool(self.backbone(images))

    def projected(self, images: Tensor) -> Tensor:
        """Normalized float images [B, 3, H, W] → projections [B, D], not L2-normalized."""
        if self.projector is None:
            raise ConfigError(f"{self.name}: this backbone has no projector; use a checkpoint of orl-fast train")
        projections: Tensor = self.projector(self.pooled(images))
        return projections

    def levels(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] of several depths, the deepest last (see `Backbone.levels`)."""
        return self.backbone.levels(images)

    def trainable_backbone(self) -> Backbone:
        """A copy to be fine-tuned, on the encoder's device, in training mode."""
        with torch.random.fork_rng(devices=[]):
            copied = build_backbone(self.name)
        copied.load_state_dict(self.backbone.state_dict())
        return copied.to(next(self.parameters()).device).train()

    forward = pooled


def load_encoder(path: Path) -> Encoder:
    """The encoder of a checkpoint, checkpoint.pt or the run folder that holds it, on the CPU.

    MissingStageError if there is no checkpoint; DataError if it is damaged, of another format, or its weights are not finite.
    """
    path = checkpoint_path(path)
    values = read_checkpoint(path)
    try:
        mining = MiningConfig(**values["config"]["mining"])
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away; the caller's generator must not move
            network = Network.from_description(values["encoder"])
        prefix = values["encoder"]["prefix"]
        network.load_state_dict({key.removeprefix(prefix): value for key, value in values["model"].items() if key.startswith(prefix)})
    except (ConfigError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        version = values["versions"]
        raise DataError(f"{path}: does not fit this version of orl-fast ({error}); train again, or use the version {version}") from error
    if not is_finite(network.state_dict()):
        raise DataError(f"{path}: holds weights that are not finite; use an earlier checkpoint, for example {path.parent}/epoch-*.pt")
    return _encoder(network, mining)


def random_encoder(config: Config) -> Encoder:
    """The untrained encoder that a run with this configuration starts from: the baseline of every evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        network = Network(config.model.backbone, (config.model.projector_hidden, config.model.projector_out))
    return _encoder(network, config.mining)


def _encoder(network: Network, mining: MiningConfig) -> Encoder:
    return Encoder(network.backbone, network.projector, name=network.name, mining=mining)


def is_finite(state: Mapping[str, Any]) -> bool:
    """Whether every floating-point tensor of a (nested) state_dict is finite; one wait for the device."""
    tensors = [value for value in _leaves(state) if isinstance(value, Tensor) and value.is_floating_point() and value.numel()]
    return not tensors or bool(torch.stack([torch.isfinite(value).all() for value in tensors]).all())


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for entry in value.values() for leaf in _leaves(entry)]
    return [leaf for entry in value for leaf in _leaves(entry)] if isinstance(value, list | tuple) else [value]


def weights_digest(module: nn.Module) -> str:
    """Names the parameters and buffers of a module."""
    weights = hashlib.sha256()
    for name, value in module.state_dict().items():
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    return weights.hexdigest()[:16]
