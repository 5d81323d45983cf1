"""Random access to packed JPEGs, without a copy."""

import ctypes
import mmap
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError
from orl_fast.shards.index import ShardIndex

_MAX_OPEN_FILES, _MAX_OPEN_MAPS = 16_384, 4096
_WILL_NEED, _POPULATE_READ = 3, 22  # of Linux's madvise, which the mmap module calls with the GIL held
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


class MappedFiles:
    """Numbered files, memory-mapped when first read; a bounded number of maps stays open. Threads that race map a file twice at worst."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], *, remedy: str) -> None:
        """Args: sizes: bytes that each file had when it was written. remedy: what to do if it has not now."""
        self._paths, self._sizes, self._remedy = paths, sizes, remedy
        self._map: Callable[[int], NDArray[np.uint8]] | None = lru_cache(_max_open_maps())(self._mapped)

    def content(self, number: int) -> NDArray[np.uint8]:
        """[size] uint8, read-only; the map lives as long as the array. DataError: the file is missing or has changed in length since."""
        if self._map is None:
            raise ValueError("these files are closed")
        return self._map(number)

    def close(self) -> None:
        """Drop all maps; those that arrays still use are closed with the last of them."""
        self._map = None

    def _mapped(self, number: int) -> NDArray[np.uint8]:
        path, num_bytes = self._paths[number], int(self._sizes[number])
        try:
            with path.open("rb") as file:
                data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DataError(f"{path}: cannot be read ({error}); {self._remedy}") from error
        if len(data) != num_bytes:
            raise DataError(f"{path}: has {len(data)} bytes, was packed with {num_bytes}; {self._remedy}")
        return data


class ShardReader(AbstractContextManager["ShardReader"]):
    """Reads the JPEG bytes of any row. Safe to share between threads and across a fork."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        remedy = "restore the file, or pack the images again with orl-fast shard --overwrite"
        self._shards = MappedFiles(index.shard_paths, index.shards["num_bytes"].tolist(), remedy=remedy)

    def read(self, i: int) -> bytes:
        """The JPEG of row `i`. IndexError: there is no such row. DataError: its shard is missing or has changed in length since."""
        return self.view(i).tobytes()

    def view(self, i: int) -> NDArray[np.uint8]:
        """[size] uint8, read-only: the JPEG of row `i` within the memory map, which lives as long as the view does. Raises as `read`."""
        if not 0 <= i < len(self.index):
            raise IndexError(f"row {i} of {len(self.index)}")
        offset = int(self.index.offsets[i])
        return self._shards.content(int(self.index.shard_ids[i]))[offset : offset + int(self.index.sizes[i])]

    def views(self, rows: Sequence[int] | NDArray[Any]) -> list[NDArray[np.uint8]]:
        """The `view` of each row."""
        return [self.view(int(row)) for row in rows]

    def close(self) -> None:
        """Drop all maps; those that views still use are closed with their last view."""
        self._shards.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[ShardIndex]]:
        return ShardReader, (self.index,)


def advise(data: NDArray[np.uint8], *, now: bool) -> None:
    """Have the system read the file behind a contiguous part of a memory map: in the background, or `now`, before this returns.

    Anything else, and a system that does not know the one or the other, is left as it is. Nothing is copied, and the GIL is released.
    """
    start = data.ctypes.data - data.ctypes.data % mmap.PAGESIZE
    if _madvise is not None:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(data.ctypes.data + data.nbytes - start), _POPULATE_READ if now else _WILL_NEED)


@cache
def _max_open_maps() -> int:
    """How many maps a reader keeps open. Each holds a file descriptor, so the process's soft limit, often 1024, is raised first.

    COCO has 463 shards. Mapping a shard again takes some 30 microseconds, decoding an image 1.7 ms.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (_MAX_OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, _MAX_OPEN_FILES) for limit in limits)
    if soft < hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, limits[1]))
            soft = hard
    return min(_MAX_OPEN_MAPS, max(16, soft // 2))
