"""Saving a run, and resuming it: the last two checkpoints are kept, and a run is resumed only as the run that it was."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import orl_fast
from orl_fast.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint, read_header, write_checkpoint
from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.files import require_free_space, sync_folder
from orl_fast.methods import Method
from orl_fast.recipe import config_from_dict, config_to_dict

# What may change between the parts of a run, since it changes no result. The renderer, and patches, have checks of their own.
_FREE = {
    *("train.log_every_steps", "train.checkpoint_every_epochs", "train.checkpoint_every_min", "train.keep_every_epochs"),
    *(f"loader.{key}" for key in ("renderer", "num_threads", "prefetch", "source", "use_patches")),
}
_LIMITS = {"mining.num_neighbors", "mining.pair_ratio"}  # of the mined pairs in use; the rest of `mining` is in the tables' fingerprints
_FOLLOWING = ".checkpoint-following.pt"
_REMEDY = "start from scratch with --restart, or use another folder with --out"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What makes a run this run: to be resumed, it must be the same.

    Attributes:
        index: fingerprint of the packed images. mined: fingerprints of the tables in use, by name. renderer: what draws the views.
    """

    method: str
    config: Config
    index: str
    mined: Mapping[str, str]
    renderer: str
    num_steps: int


def save(path: Path, *, identity: RunIdentity, method: Method, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the state after `step` steps.

    Raises:
        DataError: the disk is full; what was there stays.
    """
    prefix = next(name for name, module in method.named_modules() if module is method.online)
    header = {
        "method": identity.method,
        "step": step,
        "num_steps": identity.num_steps,
        "encoder": {**method.online.description, "prefix": f"{prefix}."},
        "config": config_to_dict(identity.config),
        "index": identity.index,
        "mined": dict(identity.mined),
        "renderer": identity.renderer,
        "versions": _versions(),
    }
    write_checkpoint(path, header, model=method.state_dict(), optimizer=optimizer.state_dict())


def save_latest(folder: Path, write: Callable[[Path], None]) -> None:
    """Write checkpoint.pt; the one before becomes checkpoint-previous.pt once the new one is whole. Raises as `save`."""
    latest, previous, following = folder / CHECKPOINT, folder / PREVIOUS, folder / _FOLLOWING
    write(following)
    if latest.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(latest, previous)  # not moved, so that a checkpoint.pt is there at every moment
        except OSError:  # a file system without links
            latest.rename(previous)
    following.replace(latest)
    sync_folder(folder)


def earlier_run(folder: Path) -> Mapping[str, Any] | None:
    """The header of the checkpoint to resume from (see `orl_fast.checkpoint`); None where there is none.

    Raises:
        DataError: both checkpoints are damaged.
    """
    return next((values for values, _ in _readable(folder, read_header, level=logging.DEBUG)), None)


def restore(folder: Path, identity: RunIdentity, *, method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest state that is not damaged into method and optimizer; returns the steps done, 0 where there is none.

    Raises:
        StaleError: the checkpoint is another run's. DataError: both checkpoints are damaged.
    """
    for values, path in _readable(folder, read_checkpoint, level=logging.WARNING):
        _check_same_run(path, values, identity)
        try:
            method.load_state_dict(values["model"])
            optimizer.load_state_dict(values["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"{path}: does not fit the model ({str(error).splitlines()[0]}); train again with --restart") from error
        return int(values["step"])
    return 0


def require_checkpoint_space(folder: Path, *, method: nn.Module) -> None:
    """Refuse a run whose checkpoints will not fit: the last two stay until a third is whole.

    Raises:
        DataError: not enough space is free.
    """
    state = sum(value.numel() * value.element_size() for value in method.state_dict().values())
    momenta = sum(value.numel() * value.element_size() for value in method.parameters() if value.requires_grad)
    files = [folder / name for name in (CHECKPOINT, PREVIOUS, _FOLLOWING)]
    there = sum(file.stat().st_size for file in files if file.exists())
    require_free_space(folder, num_bytes=max(0, 3 * (state + momenta) - there), purpose="three checkpoints (two kept, one being written)")


def _readable(folder: Path, read: Callable[[Path], Mapping[str, Any]], *, level: int) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """The latest checkpoints that can be read, with their paths; a damaged one is passed over, and logged at `level`."""
    paths = [path for path in (folder / CHECKPOINT, folder / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            yield read(path), path
        except DataError as error:
            if path == paths[-1]:
                raise
            log.log(level, "%s; resuming from %s", error, paths[-1].name)


def _check_same_run(path: Path, values: Mapping[str, Any], identity: RunIdentity) -> None:
    if values["method"] != identity.method:
        raise StaleError(f"{path}: holds a {values['method']} run, this is {identity.method}; {_REMEDY}")
    if values["index"] != identity.index:
        raise StaleError(f"{path}: trained on shards {values['index']}, these are {identity.index}; {_REMEDY}")
    for name in sorted(values["mined"].keys() | identity.mined.keys()):
        then, now = values["mined"].get(name), identity.mined.get(name)
        if then != now:
            raise StaleError(f"{path}: trained with {name} {then}, now {now}; {_REMEDY}")
    if values["renderer"] != identity.renderer:
        raise StaleError(
            f"{path}: its views are rendered by {values['renderer']}, {identity.renderer} is asked for; leave --renderer out, or {_REMEDY}"
        )
    try:
        recorded, asked = (_flat(config) for config in (config_from_dict(values["config"], where=str(path)), identity.config))
    except ConfigError as error:
        raise StaleError(f"{path}: its configuration is of another version of orl-fast ({error}); {_REMEDY}") from error
    changed = [key for key in recorded if recorded[key] != asked[key] and not _is_free(key, identity)]
    if changed:
        what = "; ".join(f"{key} = {recorded[key]} then, {asked[key]} now" for key in changed)
        raise StaleError(f"{path}: the run was configured differently ({what}); {_REMEDY}")
    for name, version in _versions().items():
        if values["versions"].get(name) != version:
            log.warning(
                "%s: written by %s %s, this is %s; results may differ in last digits", path, name, values["versions"].get(name), version
            )


def _is_free(key: str, identity: RunIdentity) -> bool:
    if key.startswith("mining."):
        return not identity.mined or key not in _LIMITS
    return key in _FREE or (key == "loader.hw_decoder_load" and identity.renderer != "gpu")


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config_to_dict(config).items():
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _versions() -> dict[str, str]:
    return {
        "orl-fast": orl_fast.__version__,
        "torch": torch.__version__.split("+")[0],
        "torchvision": torchvision.__version__.split("+")[0],
    }
