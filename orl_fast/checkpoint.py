"""Checkpoints: one file written by `torch.save`, readable with `weights_only=True`, with a header that is read without the weights.

    format             2
    method             "byol", "orl", …
    step               steps done, of num_steps: the whole state of the loader and the schedules
    model              the method's state_dict, for example "online.backbone.…" (torchvision's names), "online.projector.…", "target.…"
    optimizer          the optimizer's state_dict
    encoder            what rebuilds the encoder without the method: "backbone" (name), "projector" (see `Mlp.settings`), and "prefix", of
                       its entries in `model`
    config             the run's configuration as nested dicts (`orl_fast.recipe.config_from_dict`)
    index              fingerprint of the packed images
    mined              fingerprints of the mined tables in use, by name; empty for methods that need none
    renderer           what drew the views: "cpu", "gpu", "reference", "dali-cpu"
    versions           of orl-fast, torch and torchvision

The header, a JSON file inside the archive, holds all but model and optimizer. A run folder keeps the last two checkpoints.
"""

import json
import logging
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from orl_fast.console import log
from orl_fast.errors import DataError, MissingStageError
from orl_fast.files import atomic_file, sync_folder

FORMAT = 2
CHECKPOINT, PREVIOUS, FOLLOWING = "checkpoint.pt", "checkpoint-previous.pt", ".checkpoint-following.pt"  # of a run folder
_HEADER = "archive/orl-fast.json"  # torch.save calls its folder so
_FOLDER = 0x10  # as DOS marks it
_KEYS = {"method", "step", "num_steps", "encoder", "config", "index", "mined", "renderer", "versions"}
_DAMAGE = (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError, TypeError)


def write_checkpoint(path: Path, header: Mapping[str, Any], *, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically (see the module). DataError if the disk is full, or the folder cannot be written."""
    # Through JSON, so that strings which happen to be one object do not show in the bytes: a resumed run writes what a straight one does.
    header = json.loads(json.dumps({"format": FORMAT, **header}))
    with atomic_file(path) as file:
        torch.save({**header, "model": model, "optimizer": optimizer}, file)
        file.flush()
        with zipfile.ZipFile(file.name, "a") as archive:  # by its name: appending also reads
            archive.writestr(zipfile.ZipInfo(_HEADER), json.dumps(header))  # without the time, so that equal runs give equal bytes


def checkpoint_path(path: Path) -> Path:
    """The checkpoint of a run folder, or the file itself."""
    return path / CHECKPOINT if path.is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of orl-fast, even a damaged one, rather than weights of another toolkit."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _HEADER in archive.namelist()
    except _DAMAGE:  # a damaged directory gives nearly anything
        return path.name in (CHECKPOINT, PREVIOUS)


def read_header(path: Path) -> Mapping[str, Any]:
    """Everything but the weights; raises as `read_checkpoint`."""
    with _opened(path) as archive:
        if _HEADER not in archive.namelist():
            raise DataError(f"{path}: not a checkpoint of this version of orl-fast; {_remedy(path)}")
        return _checked(path, json.loads(archive.read(_HEADER)), _KEYS)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The contents of a checkpoint (see the module), its checksums verified.

    MissingStageError if there is no such file, DataError if it is damaged, no checkpoint, or of another format.
    """
    return _checked(path, read_state(path), _KEYS | {"model", "optimizer"})


def read_state(path: Path) -> Any:
    """What `torch.save` wrote, read with `weights_only=True` onto the CPU, its checksums verified; raises as `read_checkpoint`."""
    with _opened(path) as archive:  # torch.load itself compares no checksums, and gives what was in memory for an entry marked as a folder
        damaged = archive.testzip() or next((entry.filename for entry in archive.infolist() if entry.external_attr & _FOLDER), None)
        if damaged is not None:
            raise DataError(f"{path}: damaged ({damaged} fails its checksum); {_remedy(path)}")
        return torch.load(path, map_location="cpu", weights_only=True)


def save_latest(folder: Path, write: Callable[[Path], None]) -> None:
    """Write checkpoint.pt; the one before becomes checkpoint-previous.pt once the new one is whole. Where `write` fails, both stay."""
    latest, previous, following = folder / CHECKPOINT, folder / PREVIOUS, folder / FOLLOWING
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
    return next((values for values, _ in readable_checkpoints(folder, read_header, level=logging.DEBUG)), None)


def readable_checkpoints(
    folder: Path, read: Callable[[Path], Mapping[str, Any]] = read_checkpoint, *, level: int = logging.WARNING
) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """The latest checkpoints of a run folder that can be read, with their paths; a damaged one is passed over, and logged at `level`."""
    paths = [path for path in (folder / CHECKPOINT, folder / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            yield read(path), path
        except DataError as error:
            if path == paths[-1]:
                raise
            log.log(level, "%s; resuming from %s", error, paths[-1].name)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; any error while reading means that the checkpoint is damaged."""
    if not path.is_file():
        raise MissingStageError(f"{path}: there is no checkpoint; run orl-fast train first, or name one with --checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: damaged or not a checkpoint ({reason}); {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    """Weights of another toolkit are not to be removed, which a message about the checkpoint of a run says."""
    if path.name in (CHECKPOINT, PREVIOUS):
        return "use another checkpoint, or remove it and train again"
    return (
        f"give a run of orl-fast train, or its {CHECKPOINT} (weights of another toolkit lack the projector, which mining needs; "
        "orl-fast eval and orl-fast export take them)"
    )


def _checked(path: Path, values: Any, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(values, dict) or "format" not in values:
        raise DataError(f"{path}: not a checkpoint of orl-fast; {_remedy(path)}")
    if values["format"] != FORMAT:
        raise DataError(f"{path}: checkpoint format {values['format']}, this version reads {FORMAT}; {_remedy(path)}")
    if missing := keys - values.keys():
        raise DataError(f"{path}: damaged ({', '.join(sorted(missing))} is missing); {_remedy(path)}")
    return values
