"""The manifest of a dataset: written last, so that a dataset with a manifest is complete (shards/FORMAT.md)."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orl_fast.errors import DataError
from orl_fast.files import write_json

VERSION = 1
MANIFEST_NAME, INDEX_NAME, NAMES_NAME, SHARDS_NAME = "manifest.json", "index.npy", "names.bin", "shards.npy"
TABLE_NAMES = (INDEX_NAME, NAMES_NAME, SHARDS_NAME)
WORK_NAME = ".work"  # the state of an unfinished run


def tar_path(folder: Path, shard: int) -> Path:
    """The file of a shard; shards are numbered from 0, without gaps."""
    return folder / f"images-{shard:06d}.tar"


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One packed folder. `num_absent` images are in `annotations` but not on disk; `num_unlisted` the other way around, and packed last."""

    folder: str
    annotations: str | None
    num_packed: int
    num_absent: int
    num_unlisted: int


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """An image that was not packed, and the reason."""

    source: int
    file_name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete dataset holds. `num_original` images kept their bytes, `reencoded` counts the others by reason."""

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
        """Read the manifest of a complete dataset; DataError if it is missing, damaged, or of another format version."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise DataError(_why_no_dataset(folder))
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            if values["version"] != VERSION:
                raise DataError(f"{path}: format version {values['version']}, this version reads {VERSION}; pack the images again")
            values["quarantined"] = tuple(Quarantined(**entry) for entry in values["quarantined"])
            values["sources"] = tuple(SourceEntry(**entry) for entry in values["sources"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error!r}); pack the images again with orl-fast shard --overwrite") from error


def fingerprint_of(checksums: Iterable[bytes]) -> str:
    """32 hexadecimal digits that identify the packed content: keys, ids, bytes and their division into shards."""
    return hashlib.sha256(b"\n".join([f"orl-fast shards {VERSION}".encode(), *checksums])).hexdigest()[:32]


def _why_no_dataset(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; pack images into it with: orl-fast shard SRC --out {folder}"
    if not folder.is_dir():
        return f"{folder}: is a file, not a folder; give the folder that orl-fast shard wrote"
    if (folder / WORK_NAME).is_dir():
        return f"{folder}: packing was not finished; run the same orl-fast shard command to resume"
    return f"{folder}: not a dataset ({MANIFEST_NAME} is missing); pack images into it with: orl-fast shard SRC --out {folder}"
