"""Files that are either whole or absent: written to a temporary name, synced, renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends well. A killed run leaves `path` as it was.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    with _temporary(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that replaces `path` when the block ends well; raises as `atomic_file`."""
    with _temporary(path) as temporary:
        _remove(temporary)  # left by a killed run
        temporary.mkdir()
        yield temporary
        _remove(path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        _remove(temporary)
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            message = "the disk is full; free some space and run the same command again, it goes on where it stopped"
            raise DataError(f"{path}: {message}") from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise DataError(f"{path}: cannot be written ({os.strerror(code)}); choose another folder") from error
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write one array as .npy, atomically."""
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free_space(path: Path, *, num_bytes: int, purpose: str) -> None:
    """Refuse work that will not fit on the disk of `path`, which need not exist yet.

    Raises:
        DataError: fewer than `num_bytes` plus 2 % are free.
    """
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes * 1.02:
        needs = f"{purpose} takes {human_bytes(num_bytes)}, {human_bytes(free)} are free"
        raise DataError(f"{path}: {needs}; free some space or choose another folder")


def human_bytes(num_bytes: float) -> str:
    """'3.1 GB' for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
