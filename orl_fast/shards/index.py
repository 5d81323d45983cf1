"""A dataset's manifest and memory-mapped index (shards/FORMAT.md). Opening them takes as long for 100 images as for 100 million."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from orl_fast.errors import DataError
from orl_fast.files import write_json

VERSION = 1
MANIFEST_NAME, INDEX_NAME, NAMES_NAME, SHARDS_NAME = "manifest.json", "index.npy", "names.bin", "shards.npy"
WORK_NAME = ".work"  # the state of an unfinished run
# One row per image, little-endian, 48 bytes: a lookup touches one cache line. `name_end` is the end of the row's text in names.bin.
_INT64, _INT32 = ("offset", "size", "image_id", "name_end"), ("shard", "height", "width", "source")
ROW = np.dtype([(name, "<i8") for name in _INT64] + [(name, "<i4") for name in _INT32])
# One row per shard: its first image, the length of its file, and the file's SHA-256 in hexadecimal digits.
SHARD = np.dtype([("first_row", "<i8"), ("num_bytes", "<i8"), ("sha256", "S64")])


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


class ShardIndex:
    """The images of a dataset: row i is image i in every table of orl-fast."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.fingerprint = self.manifest.fingerprint  # identifies the packed content of `path`; tables made from it store it
        self.num_shards = self.manifest.num_shards
        self.shards = _mapped(self.path / SHARDS_NAME, SHARD, self.num_shards)  # [S] records of `first_row`, `num_bytes` and `sha256`
        rows = _mapped(self.path / INDEX_NAME, ROW, self.manifest.num_images)
        self.heights, self.widths = rows["height"], rows["width"]  # [N] int32, pixels of the decoded image
        self.image_ids = rows["image_id"]  # [N] int64, the ids of the COCO annotation file, if there was one
        self.shard_ids, self.sources = rows["shard"], rows["source"]  # [N] int32; sources are positions in manifest.sources
        self.offsets, self.sizes = rows["offset"], rows["size"]  # [N] int64, the JPEG's position within its shard, in bytes
        names = _mapped(self.path / NAMES_NAME, np.uint8, int(rows["name_end"][-1]))
        # [N] str, decoded on access; file names are relative to their source folder.
        self.keys, self.file_names = (_Names(rows["name_end"], names, part=part) for part in (0, 1))

    @classmethod
    def open(cls, path: Path) -> "ShardIndex":
        """Open the folder that `write_shards` wrote; DataError if it is missing, unfinished, damaged or of another format version."""
        return cls(path)

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self) -> tuple[Callable[[Path], "ShardIndex"], tuple[Path]]:
        return ShardIndex, (self.path,)  # other processes map the files again instead of receiving them

    @cached_property
    def shard_paths(self) -> list[Path]:
        return [tar_path(self.path, shard) for shard in range(self.num_shards)]

    def shard_rows(self, shard: int) -> range:
        """The rows of one shard; they are contiguous, and shards are in order."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        start, *following = self.shards["first_row"][shard : shard + 2].tolist()
        return range(start, following[0] if following else len(self))


class _Names(Sequence[str]):
    """Keys (part 0) or file names (part 1), decoded on access."""

    def __init__(self, ends: NDArray[np.int64], text: NDArray[np.uint8], *, part: int) -> None:
        self._ends, self._text, self._part = ends, text, part

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:  # str for an int, list for a slice
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # handles negative rows, raises IndexError
        start = int(self._ends[row - 1]) if row else 0
        key, file_name = self._text[start : self._ends[row]].tobytes().split(b"\0")
        return (key, file_name)[self._part].decode("utf-8", "surrogateescape")


def _mapped(path: Path, dtype: DTypeLike, length: int) -> NDArray[Any]:
    """A plain array over a memory map: np.memmap is slower to index."""
    try:
        found = np.asarray(np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, dtype=dtype, mode="r"))
        if found.dtype != dtype or found.shape != (length,):
            raise ValueError(f"its shape is {found.shape}, expected ({length},)")
    except Exception as error:  # NumPy's parser of headers raises anything at all on garbage
        raise DataError(f"{path}: missing or damaged ({error}); pack the images again with orl-fast shard --overwrite") from error
    return found
