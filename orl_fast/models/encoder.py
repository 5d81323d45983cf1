"""Trained encoders out of checkpoints, for mining and evaluations.

A checkpoint is one file written by `torch.save`, readable with `weights_only=True`, a dict:

    format             1
    method             "byol", "orl", …
    step               steps done: the whole state of the loader and the schedules
    model              the method's state_dict: "online.backbone.…" (torchvision's names), "online.projector.…", "target.…", "predictors.…"
    optimizer          the optimizer's state_dict
    config             the run's configuration as nested dicts (`orl_fast.config.config_from_dict`)
    index              fingerprint of the packed images
    mined              fingerprints of the mined tables in use, by name; empty for methods that need none
    versions           of orl-fast, torch and torchvision
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orl_fast.config import Config, config_from_dict
from orl_fast.errors import ConfigError, DataError, MissingStageError
from orl_fast.models.heads import pool
from orl_fast.models.momentum import Branch

CHECKPOINT_FORMAT = 1
_KEYS = {"format", "method", "step", "model", "optimizer", "config", "index", "mined", "versions"}


class Encoder(nn.Module):
    """The online branch, in eval mode and without gradients.

    Attributes:
        config: the run's configuration.
        fingerprint: digest of the weights; tables made with the encoder carry it.
    """

    def __init__(self, branch: Branch, *, config: Config) -> None:
        super().__init__()
        self.backbone, self.projector = branch.backbone, branch.projector
        self.config = config
        self.fingerprint = _digest_weights(branch)
        self.requires_grad_(False).eval()

    @property
    def num_features(self) -> int:
        """Channels of the feature map."""
        return self.backbone.num_features

    def pooled(self, images: Tensor) -> Tensor:
        """Normalized float images [B, 3, H, W] → globally average-pooled features [B, C]."""
        return pool(self.backbone(images))

    def projected(self, images: Tensor) -> Tensor:
        """Normalized float images [B, 3, H, W] → projections [B, projector_out], not L2-normalized."""
        projections: Tensor = self.projector(self.pooled(images))
        return projections

    forward = pooled


def load_encoder(path: Path) -> Encoder:
    """The encoder of a checkpoint, on the CPU.

    Args:
        path: checkpoint.pt, or the run folder that holds it.
    Raises:
        MissingStageError: there is no checkpoint. DataError: it is damaged or of another format.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    values = read_checkpoint(path)
    try:
        config = config_from_dict(values["config"], where=str(path))
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away; the caller's generator must not move
            branch = Branch(config.model)
        branch.load_state_dict({key.removeprefix("online."): value for key, value in values["model"].items() if key.startswith("online.")})
    except (ConfigError, RuntimeError) as error:
        raise DataError(
            f"{path}: does not fit this version of orl-fast ({error}); train again, or use the version {values['versions']}"
        ) from error
    return Encoder(branch, config=config)


def random_encoder(config: Config) -> Encoder:
    """The untrained encoder that a run with this configuration starts from: the baseline of every evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return Encoder(Branch(config.model), config=config)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The contents of a checkpoint (see the module), its checksums verified.

    Raises:
        MissingStageError: there is no such file. DataError: it is damaged, no checkpoint, or of another format.
    """
    if not path.is_file():
        raise MissingStageError(f"{path}: there is no checkpoint; run orl-fast train first, or name one with --checkpoint")
    remedy = "use another checkpoint, or remove it and train again"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"{path}: damaged ({damaged} fails its checksum); {remedy}")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: damaged or not a checkpoint ({str(error).splitlines()[0]}); {remedy}") from error
    if not isinstance(values, dict) or not values.keys() >= _KEYS:
        raise DataError(f"{path}: not a checkpoint of orl-fast; {remedy}")
    if values["format"] != CHECKPOINT_FORMAT:
        raise DataError(f"{path}: checkpoint format {values['format']}, this version reads {CHECKPOINT_FORMAT}; {remedy}")
    return values


def _digest_weights(branch: nn.Module) -> str:
    weights = hashlib.sha256()
    for name, value in branch.state_dict().items():
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    return weights.hexdigest()[:16]
