"""Saving a run, and resuming it: the last two checkpoints are kept, and a run is resumed only as the run that it was.

A run is known by the header of its checkpoints (see `orl_fast.checkpoint`).
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orl_fast.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint, read_header
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


def save_latest(folder: Path, write: Callable[[Path], None]) -> None:
    """Write checkpoint.pt; the one before becomes checkpoint-previous.pt once the new one is whole. Where `write` fails, both stay."""
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
    """The header of the checkpoint to resume from; None where there is none. DataError if both checkpoints are damaged."""
    return next((values for values, _ in _readable(folder, read_header, level=logging.DEBUG)), None)


def restore(folder: Path, header: Mapping[str, Any], *, method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest state that is not damaged into method and optimizer; returns the steps done, 0 where there is none.

    StaleError if the checkpoint is of a run with another header, DataError if both checkpoints are damaged.
    """
    for values, path in _readable(folder, read_checkpoint, level=logging.WARNING):
        _check_same_run(path, values, header)
        try:
            method.load_state_dict(values["model"])
            optimizer.load_state_dict(values["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"{path}: does not fit the model ({str(error).splitlines()[0]}); train again with --restart") from error
        return int(values["step"])
    return 0


def require_checkpoint_space(folder: Path, *, method: nn.Module) -> None:
    """DataError if a run's checkpoints will not fit: the last two stay until a third is whole."""
    state = sum(value.nbytes for value in method.state_dict().values())
    momenta = sum(value.nbytes for value in method.parameters() if value.requires_grad)
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


def _check_same_run(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if then["method"] != now["method"]:
        raise StaleError(f"{path}: holds a {then['method']} run, this is {now['method']}; {_REMEDY}")
    if then["index"] != now["index"]:
        raise StaleError(f"{path}: trained on shards {then['index']}, these are {now['index']}; {_REMEDY}")
    for name in sorted(then["mined"].keys() | now["mined"].keys()):
        if then["mined"].get(name) != now["mined"].get(name):
            raise StaleError(f"{path}: trained with {name} {then['mined'].get(name)}, now {now['mined'].get(name)}; {_REMEDY}")
    if then["renderer"] != now["renderer"]:
        how = f"its views are rendered by {then['renderer']}, {now['renderer']} is asked for"
        raise StaleError(f"{path}: {how}; leave --renderer out, or {_REMEDY}")
    try:
        recorded = _flat(config_to_dict(config_from_dict(then["config"], where=str(path))))
    except ConfigError as error:
        raise StaleError(f"{path}: its configuration is of another version of orl-fast ({error}); {_REMEDY}") from error
    asked = _flat(now["config"])
    changed = [
        f"{key} = {recorded[key]} then, {asked[key]} now" for key in recorded if recorded[key] != asked[key] and not _is_free(key, now)
    ]
    if changed:
        raise StaleError(f"{path}: the run was configured differently ({'; '.join(changed)}); {_REMEDY}")
    for name, version in now["versions"].items():
        former = then["versions"].get(name)
        if former != version:
            log.warning("%s: written by %s %s, this is %s; results may differ in last digits", path, name, former, version)


def _is_free(key: str, header: Mapping[str, Any]) -> bool:
    if key.startswith("mining."):
        return not header["mined"] or key not in _LIMITS
    return key in _FREE or (key == "loader.hw_decoder_load" and header["renderer"] != "gpu")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return flat
