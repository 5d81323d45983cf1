"""The manifest of a shard folder: written last, so that its presence means that the folder is whole (shards/FORMAT.md)."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orl_fast.errors import DataError
from orl_fast.files import write_json

VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
NAMES_NAME = "names.bin"
SHARDS_NAME = "shards.npy"
WORK_NAME = ".work"  # what an unfinished run knows already


def tar_path(folder: Path, shard: int) -> Path:
    """Where a shard lies: shards are numbered from 0, without gaps."""
    return folder / f"images-{shard:06d}.tar"


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One packed folder. Images that `annotations` lists but that are absent on disk are counted; those it does not list come last."""

    folder: str
    annotations: str | None
    num_packed: int
    num_absent: int
    num_unlisted: int


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """An image that is not packed, and why."""

    source: int
    file_name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished shard folder holds. `num_original` counts bytes kept as found, `reencoded` the others by their reason."""

    version: int = VERSION
    fingerprint: str
    num_images: int
    num_shards: int
    num_bytes: int
    num_original: int
    reencoded: dict[str, int]
    quarantined: tuple[Quarantined, ...]
    sources: tuple[SourceEntry, ...]
    inputs: str  # digest of the settings and of the names, ids and sizes of what was packed

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST_NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a finished shard folder.

        Raises:
            DataError: there is none, it is damaged, or another version of orl-fast wrote it.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise DataError(_why_not_shards(folder))
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            if values["version"] != VERSION:
                raise DataError(f"{path}: format version {values['version']}, this orl-fast reads {VERSION}; pack the images again")
            values["quarantined"] = tuple(Quarantined(**entry) for entry in values["quarantined"])
            values["sources"] = tuple(SourceEntry(**entry) for entry in values["sources"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is damaged ({error!r}); pack the images again with orl-fast shard --overwrite") from error


def fingerprint_of(checksums: Iterable[bytes]) -> str:
    """32 hexadecimal digits that name the packed content: keys, ids, bytes and their cut into shards."""
    return hashlib.sha256(b"\n".join([f"orl-fast shards {VERSION}".encode(), *checksums])).hexdigest()[:32]


def _why_not_shards(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; pack images into it with: orl-fast shard SRC --out {folder}"
    if not folder.is_dir():
        return f"{folder}: is a file; give the folder that orl-fast shard wrote"
    if (folder / WORK_NAME).is_dir():
        return f"{folder}: packing was not finished; run the same orl-fast shard command again, it goes on where it stopped"
    return f"{folder}: holds no packed images ({MANIFEST_NAME} is missing); pack them with: orl-fast shard SRC --out {folder}"
