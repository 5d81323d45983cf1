"""Files and folders that are either whole or absent (written to a temporary name, synced, renamed), and locks on folders."""

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from orl_fast.errors import DataError

LOCK_NAME = ".lock"
_UNIQUE = "[0-9a-f]" * 16  # what `_temporary_name` puts into a name
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error. A killed run leaves `path` as it was.

    Links are followed; a device or a pipe is written through. Of simultaneous writers the last wins. DataError: disk full, or not writable.
    """
    with _plain_errors(path):
        if path.exists() and not path.is_file():
            with _created(path):
                file = path.open("wb")
            with file:
                yield file
            return
        with _temporary(path) as (target, temporary):
            with _created(path):
                file = temporary.open("xb")
            with file:
                yield file
            sync_folder(temporary)
            temporary.replace(target)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that replaces `path` when the block ends without an error; raises as `atomic_file`.

    A run killed between renaming the old folder (to NAME.XXXX.replaced) and the new one leaves the old one under that name; the next
    `atomic_folder` or `remove_leftovers` puts it back.
    """
    with _plain_errors(path), _temporary(path) as (target, temporary):
        _put_back(target)
        with _created(path):
            temporary.mkdir()
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            sync_folder(entry)
        _replace_folder(target, temporary)


@contextmanager
def locked(folder: Path, *, what: str) -> Iterator[None]:
    """Hold `folder`, which is created if it is missing, for one writer; `what` names it to the others, who get a DataError.

    The lock is on `folder/.lock`, which stays; only a block that fails and leaves nothing else behind removes it, with the folders created
    here. A process that opened a removed file locks its replacement. Without locks in the file system, the block runs after a warning.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder / LOCK_NAME
    with _open_lock(path) as file:
        with suppress(OSError):
            file.truncate(0)
            file.write(f"{what} (process {os.getpid()} on {socket.gethostname()})".encode())
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK_NAME]:
                    path.unlink()
                    for parent in created:
                        parent.rmdir()
            raise
        finally:
            with suppress(OSError):
                file.truncate(0)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`, which must be locked, and put back a folder whose replacement was interrupted."""
    for old in folder.glob(f"*.{_UNIQUE}.replaced"):
        _put_back(old.with_suffix("").with_suffix(""))
    for partial in folder.glob(f"*.{_UNIQUE}.partial"):
        _remove(partial)


def _temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.{kind}")


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the path behind links, and a unique temporary name in the same folder; what is left under it is removed."""
    target = path.resolve() if path.is_symlink() else path
    with _created(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target, "partial")
    try:
        yield target, temporary
        sync_folder(target.parent)
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def _created(path: Path) -> Iterator[None]:
    """Where a file or a folder is created, any error is about the place (ENOENT in /proc): DataError, but for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def _replace_folder(path: Path, new: Path) -> None:
    try:
        while True:
            with suppress(FileNotFoundError):
                path.rename(_temporary_name(path, "replaced"))
            try:
                new.rename(path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another writer was faster: the last one wins
                    raise
    finally:
        _put_back(path)


def _put_back(path: Path) -> None:
    """Give the replaced folder its name back if nothing has it; delete it otherwise, under a name that says that it is not whole."""
    for old in path.parent.glob(f"{escape(path.name)}.{_UNIQUE}.replaced"):
        with suppress(OSError):
            _remove(old.rename(old.with_suffix(".partial"))) if path.exists() else old.rename(path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _open_lock(path: Path) -> BinaryIO:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
            file.seek(0)
        except OSError as error:
            raise DataError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                warning = "%s: this file system has no locks (%s); let only one orl-fast command write here at a time"
                logging.getLogger("orl_fast").warning(warning, path.parent, error.strerror)
                return file
            with file:
                holder = file.read().decode(errors="replace") or "another process"
            if not isinstance(error, BlockingIOError):
                raise DataError(f"{path}: cannot be locked ({error.strerror}); choose another folder") from error
            raise DataError(f"{path.parent}: {holder} is writing here; wait for it to end, or choose another folder") from error
        file.close()  # the last holder has removed this file since it was opened: lock the one that is there now


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # libraries that write to a file hide its error behind their own
        while cause is not None and getattr(cause, "errno", None) not in _FULL:
            cause = cause.__context__
        if cause is not None:
            raise DataError(f"{path}: the disk is full; free some space and run the same command again to resume") from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write one array as .npy, atomically."""
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


def sync_folder(path: Path) -> None:
    """Make the names in a folder (or the content of a file) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *_UNSUPPORTED):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def require_free_space(path: Path, *, num_bytes: int, purpose: str) -> None:
    """Raise a DataError if fewer than `num_bytes` plus 2 % are free on the disk of `path`, which need not exist yet."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes * 1.02:
        needs = f"{purpose} takes {human_bytes(num_bytes)}, {human_bytes(free)} are free"
        raise DataError(f"{path}: {needs}; free some space or choose another folder")


def human_bytes(num_bytes: float) -> str:
    """'3.1 GB', for messages."""
    return decimal(int(num_bytes))
