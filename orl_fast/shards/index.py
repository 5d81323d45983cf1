"""The memory-mapped index of a dataset. Opening it takes as long for a hundred images as for a hundred million."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from orl_fast.errors import DataError
from orl_fast.shards.manifest import INDEX_NAME, NAMES_NAME, SHARDS_NAME, Manifest, tar_path

# One row per image, little-endian, 48 bytes: a lookup touches one cache line. `name_end` is the end of the row's text in names.bin.
_INT64, _INT32 = ("offset", "size", "image_id", "name_end"), ("shard", "height", "width", "source")
ROW = np.dtype([(name, "<i8") for name in _INT64] + [(name, "<i4") for name in _INT32])
# One row per shard: its first image, the length of its file, and the file's SHA-256 in hexadecimal digits.
SHARD = np.dtype([("first_row", "<i8"), ("num_bytes", "<i8"), ("sha256", "S64")])


class ShardIndex:
    """The images of a dataset: row i is image i in every table of orl-fast.

    Attributes:
        fingerprint: identifies the packed content of the folder `path`; tables made from it store it.
        shards: [S] records of `first_row`, `num_bytes` and `sha256`.
        heights, widths: [N] int32, pixels of the decoded image.
        image_ids: [N] int64, the ids of the COCO annotation file, if there was one.
        shard_ids: [N] int32; offsets, sizes: [N] int64, the JPEG's position within its shard, in bytes.
        sources: [N] int32, position in manifest.sources.
        keys, file_names: [N] str, decoded on access; file names are relative to their source folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.fingerprint = self.manifest.fingerprint
        self.num_shards = self.manifest.num_shards
        self.shards: NDArray[np.void] = _mapped(self.path / SHARDS_NAME, SHARD, self.num_shards)
        rows: NDArray[np.void] = _mapped(self.path / INDEX_NAME, ROW, self.manifest.num_images)
        self.heights, self.widths, self.shard_ids, self.sources = (rows[name] for name in ("height", "width", "shard", "source"))
        self.image_ids, self.offsets, self.sizes = (rows[name] for name in ("image_id", "offset", "size"))
        names: NDArray[np.uint8] = _mapped(self.path / NAMES_NAME, np.uint8, int(rows["name_end"][-1]))
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
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); pack the images again with orl-fast shard --overwrite") from error
    return found
