"""Random access to packed JPEGs, without a copy."""

import mmap
import resource
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError
from orl_fast.shards.index import ShardIndex, tar_path

_MAX_OPEN_FILES, _MAX_OPEN_MAPS = 16_384, 4096


class ShardReader(AbstractContextManager["ShardReader"]):
    """Reads the JPEG bytes of any row. Safe to share between threads and across a fork.

    Shards are mapped when first read, and a bounded number of maps stays open; threads that race map a shard twice at worst.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._shard: Callable[[int], NDArray[np.uint8]] | None = lru_cache(_max_open_maps())(partial(_mapped, index))

    def read(self, i: int) -> bytes:
        """The JPEG of row `i`. IndexError: there is no such row. DataError: its shard is missing or has changed in length since."""
        return self.view(i).tobytes()

    def view(self, i: int) -> NDArray[np.uint8]:
        """[size] uint8, read-only: the JPEG of row `i` within the memory map, which lives as long as the view does. Raises as `read`."""
        if not 0 <= i < len(self.index):
            raise IndexError(f"row {i} of {len(self.index)}")
        if self._shard is None:
            raise ValueError("this ShardReader is closed")
        offset = int(self.index.offsets[i])
        return self._shard(int(self.index.shard_ids[i]))[offset : offset + int(self.index.sizes[i])]

    def views(self, rows: Sequence[int] | NDArray[Any]) -> list[NDArray[np.uint8]]:
        """The `view` of each row."""
        return [self.view(int(row)) for row in rows]

    def close(self) -> None:
        """Drop all maps; those that views still use are closed with their last view."""
        self._shard = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[ShardIndex]]:
        return ShardReader, (self.index,)


def _mapped(index: ShardIndex, shard: int) -> NDArray[np.uint8]:
    path, num_bytes = tar_path(index.path, shard), int(index.shards["num_bytes"][shard])
    remedy = "restore the file, or pack the images again with orl-fast shard --overwrite"
    try:
        with path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if len(data) != num_bytes:
        raise DataError(f"{path}: has {len(data)} bytes, was packed with {num_bytes}; {remedy}")
    return data


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
