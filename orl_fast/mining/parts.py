"""Tables that are filled shard by shard: what a killed run has finished stays, and the bytes are the same in the end.

While it is filled, the table's folder holds one file per shard, NAME-000000.npy …, and `unfinished.json`, which tells what it will be
made from. `table.json` is written last: without it, the folder is no table.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from orl_fast.console import log
from orl_fast.files import atomic_file, write_json
from orl_fast.tables import TableInfo, table_info, write_info

UNFINISHED = "unfinished.json"


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process among those that mine together: it takes every `world_size`-th shard.

    Attributes:
        barrier: returns when all processes have called it.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class ShardedTable:
    """How to make one table shard by shard.

    Attributes:
        path: the table's folder. info: what it is made from.
        num_shards: how many parts.
        last: the array that a shard's part is finished with; its file tells that the shard is done.
        work: does some shards, each of which ends with `part(last, shard)`.
        finish: joins the parts into the table's arrays; None where the parts are the arrays.
    """

    path: Path
    info: TableInfo
    num_shards: int
    last: str
    work: Callable[[list[int]], None]
    finish: Callable[[], None] | None = None

    def is_current(self) -> bool:
        found = table_info(self.path)
        return found is not None and found.fingerprint == self.info.fingerprint

    def make(self, share: Share) -> None:
        """Fill and finish the table, together with the other processes. What an earlier run has done of it is kept."""
        if share.rank == 0:
            self._prepare()
        share.barrier()
        shards = range(share.rank, self.num_shards, share.world_size)
        self.work([shard for shard in shards if not part_path(self.path, self.last, shard).exists()])
        share.barrier()
        if share.rank == 0:
            if self.finish is not None:
                self.finish()
            write_info(self.path, self.info)
            self.clean()
        share.barrier()

    def clean(self) -> None:
        """Remove what is of no use once the table is whole, for a run that was killed before it could."""
        if (self.path / UNFINISHED).exists():
            if self.finish is not None:
                for part in self.path.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].npy"):
                    part.unlink()
            for leftover in self.path.glob("*.partial"):
                leftover.unlink()
            (self.path / UNFINISHED).unlink()

    def _prepare(self) -> None:
        mark = self.path / UNFINISHED
        wanted = {"kind": self.info.kind, "fingerprint": self.info.fingerprint}
        if mark.exists() and table_info(self.path) is None and json.loads(mark.read_text()) == wanted:
            log.info("%s: goes on where it stopped", self.info.kind)
            return
        if self.path.exists():
            (self.path / "table.json").unlink(missing_ok=True)  # first, so that half a table never passes for a whole one
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_json(mark, wanted)


def part_path(path: Path, name: str, shard: int) -> Path:
    """The file of one array of one shard."""
    return path / f"{name}-{shard:06d}.npy"


@contextmanager
def array_writer(path: Path, *, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Write an .npy file of known shape block by block, atomically: memory holds one block."""
    kind = np.dtype(dtype)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(int(side) for side in shape)}
    written = 0
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)

        def write(block: NDArray[Any]) -> None:
            nonlocal written
            written += len(block)
            file.write(np.ascontiguousarray(block, kind).data)

        yield write
        if written != shape[0]:
            raise AssertionError(f"{path}: {written} rows written of {shape[0]} announced")


def join_arrays(path: Path, blocks: Iterable[NDArray[Any]], *, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Write blocks, one after another, as one .npy file."""
    with array_writer(path, shape=shape, dtype=dtype) as write:
        for block in blocks:
            write(block)
