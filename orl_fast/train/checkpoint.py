"""Writing checkpoints, and going on from them. The format is described, and read, in `orl_fast.models.encoder`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import orl_fast
from orl_fast.config import Config, config_from_dict, config_to_dict
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.files import atomic_file, require_free_space
from orl_fast.models.encoder import CHECKPOINT_FORMAT, read_checkpoint

# What may change between the parts of a run, since it changes no result.
_FREE = {
    *("train.log_every_steps", "train.checkpoint_every_epochs", "train.keep_every_epochs", "train.compile"),
    *(f"loader.{key}" for key in ("renderer", "num_threads", "prefetch", "hw_decoder_load")),
}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What makes a run this run: to go on, it must be the same.

    Attributes:
        index: fingerprint of the packed images. mined: fingerprints of the tables in use, by name.
    """

    method: str
    config: Config
    index: str
    mined: Mapping[str, str]


def save_checkpoint(path: Path, identity: RunIdentity, *, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the state after `step` steps; the file that was there stays until the new one is whole.

    Raises:
        DataError: the disk is full.
    """
    values = {
        "format": CHECKPOINT_FORMAT,
        "method": identity.method,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": config_to_dict(identity.config),
        "index": identity.index,
        "mined": dict(identity.mined),
        "versions": {
            "orl-fast": orl_fast.__version__,
            "torch": torch.__version__.split("+")[0],
            "torchvision": torchvision.__version__.split("+")[0],
        },
    }
    with atomic_file(path) as file:
        torch.save(values, file)


def restore_checkpoint(path: Path, identity: RunIdentity, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the state into model and optimizer; returns the steps done.

    Raises:
        StaleError: the checkpoint is another run's. DataError: it is damaged.
    """
    values = read_checkpoint(path)
    _check_same_run(path, values, identity)
    try:
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{path}: does not fit the model ({str(error).splitlines()[0]}); train again with --restart") from error
    return int(values["step"])


def require_checkpoint_space(folder: Path, *, model: nn.Module) -> None:
    """Refuse a run whose checkpoint will not fit: twice, since the old one stays until the new one is whole.

    Raises:
        DataError: not enough space is free.
    """
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    momenta = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    require_free_space(folder, num_bytes=2 * (state + momenta), purpose="a checkpoint, old and new")


def _check_same_run(path: Path, values: Mapping[str, Any], identity: RunIdentity) -> None:
    remedy = "start anew with --restart, or use another folder with --out"
    if values["method"] != identity.method:
        raise StaleError(f"{path}: holds a {values['method']} run, this is {identity.method}; {remedy}")
    if values["index"] != identity.index:
        raise StaleError(f"{path}: trained on shards {values['index']}, these are {identity.index}; {remedy}")
    for name in sorted(values["mined"].keys() | identity.mined.keys()):
        before, now = values["mined"].get(name), identity.mined.get(name)
        if before != now:
            raise StaleError(f"{path}: trained with {name} {before}, they are {now} now; {remedy}")
    try:
        there, here = (_flat(config) for config in (config_from_dict(values["config"], where=str(path)), identity.config))
    except ConfigError as error:
        raise StaleError(f"{path}: its configuration is of another version of orl-fast ({error}); {remedy}") from error
    free = _FREE if identity.mined else _FREE | {key for key in there if key.startswith("mining.")}
    changed = [f"{key} = {there[key]} there, {here[key]} here" for key in there if there[key] != here[key] and key not in free]
    if changed:
        raise StaleError(f"{path}: the run was configured otherwise ({'; '.join(changed)}); {remedy}")


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config_to_dict(config).items():
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return flat
