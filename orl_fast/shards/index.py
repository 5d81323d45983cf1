"""The memory-mapped table of packed images. Opening it costs the same for a hundred images and for a hundred million."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError
from orl_fast.shards.manifest import INDEX_NAME, NAMES_NAME, SHARDS_NAME, Manifest, tar_path

# One row per image, little-endian, 48 bytes: a lookup touches one cache line. `name_end` ends the row's text in names.bin.
ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("image_id", "<i8"),
        ("name_end", "<i8"),
        ("shard", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("source", "<i4"),
    ]
)
# One row per shard: its first image, the length of its file, and the SHA-256 of that, in hexadecimal digits.
SHARD = np.dtype([("first_row", "<i8"), ("num_bytes", "<i8"), ("sha256", "S64")])


class ShardIndex:
    """The images of a shard folder: row i is image i in every table of orl-fast.

    Attributes:
        path: the shard folder.
        fingerprint: names the packed content; tables made from it carry it.
        manifest: sources, counts and the quarantine list.
        shards: [S] records of `first_row`, `num_bytes` and `sha256`.
        heights, widths: [N] int32, pixels of the decoded image.
        image_ids: [N] int64, COCO's ids where an annotation file was there.
        shard_ids: [N] int32; offsets, sizes: [N] int64, where the JPEG lies within its shard, in bytes.
        sources: [N] int32, which of manifest.sources the image came from.
        keys, file_names: [N] str, decoded when asked for; file names are relative to their source folder.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: NDArray[np.void], rows: NDArray[np.void], names: NDArray[np.uint8]) -> None:
        self.path = path
        self.manifest = manifest
        self.shards = shards
        self.fingerprint = manifest.fingerprint
        self._rows = rows
        self.offsets: NDArray[np.int64] = rows["offset"]
        self.sizes: NDArray[np.int64] = rows["size"]
        self.image_ids: NDArray[np.int64] = rows["image_id"]
        self.shard_ids: NDArray[np.int32] = rows["shard"]
        self.heights: NDArray[np.int32] = rows["height"]
        self.widths: NDArray[np.int32] = rows["width"]
        self.sources: NDArray[np.int32] = rows["source"]
        self.keys: Sequence[str] = _Names(rows["name_end"], names, part=0)
        self.file_names: Sequence[str] = _Names(rows["name_end"], names, part=1)

    @classmethod
    def open(cls, path: Path) -> "ShardIndex":
        """Open the folder that `write_shards` wrote.

        Raises:
            DataError: the folder is missing, unfinished, damaged or of another format version.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        rows = _table(path / INDEX_NAME, ROW, manifest.num_images)
        shards = _table(path / SHARDS_NAME, SHARD, manifest.num_shards)
        names = _mapped(path / NAMES_NAME, lambda file: np.memmap(file, dtype=np.uint8, mode="r"))
        if rows["name_end"][-1] != len(names):
            raise _damaged(path / NAMES_NAME, f"{len(names)} bytes, the index tells {rows['name_end'][-1]}")
        return cls(path, manifest, shards, rows, names)

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> tuple[Callable[[Path], "ShardIndex"], tuple[Path]]:
        return ShardIndex.open, (self.path,)  # a worker process maps the file again instead of receiving it

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @cached_property
    def shard_paths(self) -> list[Path]:
        return [tar_path(self.path, shard) for shard in range(self.num_shards)]

    def shard_rows(self, shard: int) -> range:
        """The rows of one shard: they are contiguous, shards follow one another in order."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        last = shard == self.num_shards - 1
        return range(int(self.shards["first_row"][shard]), len(self) if last else int(self.shards["first_row"][shard + 1]))


class _Names(Sequence[str]):
    """Keys (part 0) or file names (part 1), read from the map on demand."""

    def __init__(self, ends: NDArray[np.int64], text: NDArray[np.uint8], *, part: int) -> None:
        self._ends, self._text, self._part = ends, text, part

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative rows, and IndexError beyond the end
        start = int(self._ends[row - 1]) if row else 0
        key, file_name = self._text[start : self._ends[row]].tobytes().split(b"\0")
        return (key, file_name)[self._part].decode("utf-8", "surrogateescape")


def _table(path: Path, dtype: np.dtype[np.void], num_rows: int) -> NDArray[np.void]:
    table = _mapped(path, lambda file: np.load(file, mmap_mode="r", allow_pickle=False))
    if table.dtype != dtype or table.shape != (num_rows,):
        raise _damaged(path, f"shape {table.shape}, the manifest tells {num_rows} rows")
    return table


def _mapped(path: Path, load: Callable[[Path], Any]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.asarray(load(path))  # a plain array: np.memmap is slower to index
    except FileNotFoundError as error:
        raise _damaged(path, "it is missing") from error
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    return array


def _damaged(path: Path, found: str) -> DataError:
    return DataError(f"{path}: does not belong to a whole shard folder ({found}); pack the images again with orl-fast shard --overwrite")
