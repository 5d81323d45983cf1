"""Tables that are filled shard by shard: what a killed run has finished stays, and the bytes are the same in the end.

While it is filled, the table's folder holds one file per shard, NAME-000000.npy …, and `unfinished.json`, which tells what it will be
made from. `table.json` is written last: without it, the folder is no table.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log, progress
from orl_fast.files import atomic_file, write_json
from orl_fast.tables import TableInfo, open_array, table_info, write_info

Advance = Callable[[int], None]
Work = Callable[[list[int], Advance], None]
Finish = Callable[[], None]
UNFINISHED = "unfinished.json"


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process among those that mine together: it takes every `world_size`-th shard.

    Attributes:
        barrier: returns when all processes have called it.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = lambda: None


def make_table(
    path: Path, info: TableInfo, work: Work, finish: Finish | None = None, *, last: str, sizes: Sequence[int], unit: str, share: Share
) -> None:
    """Make a table together with the other processes, unless it is up to date. What an earlier run has done of it is kept.

    Args:
        work: does some shards. finish: joins the parts into the table's arrays; None where the parts are the arrays.
        last: the array that a shard's part is finished with; its file tells that the shard is done.
        sizes: what there is to do in each shard, in `unit`, for the progress bar.
    """
    found = table_info(path)
    if found is not None and found.fingerprint == info.fingerprint:
        log.info("%s: up to date", info.kind)
    else:
        share.barrier()  # all have looked
        if share.rank == 0:
            _prepare(path, info)
        share.barrier()
        mine = range(share.rank, len(sizes), share.world_size)
        waiting = [shard for shard in mine if not part_path(path, last, shard).exists()]
        total, left = (sum(sizes[shard] for shard in shards) for shards in (mine, waiting))
        with progress(info.kind, total=total, unit=unit, done=total - left) as advance:
            work(waiting, advance)
        share.barrier()
        if share.rank == 0:
            if finish is not None:
                finish()
            write_info(path, info)
        share.barrier()
    if share.rank == 0 and (path / UNFINISHED).exists():
        useless = [*path.glob("*.partial"), *(path.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].npy") if finish else ())]
        for file in (*useless, path / UNFINISHED):
            file.unlink()


def _prepare(path: Path, info: TableInfo) -> None:
    mark, wanted = path / UNFINISHED, {"kind": info.kind, "fingerprint": info.fingerprint}
    if mark.exists() and table_info(path) is None and json.loads(mark.read_text()) == wanted:
        log.info("%s: goes on where it stopped", info.kind)
        return
    if path.exists():
        (path / "table.json").unlink(missing_ok=True)  # first, so that half a table never passes for a whole one
        shutil.rmtree(path)
    path.mkdir(parents=True)
    write_json(mark, wanted)


def pieces(images: range, size: int) -> Iterator[range]:
    """Cut into ranges of `size`; the last may be shorter."""
    return (images[start : start + size] for start in range(0, len(images), size))


def part_path(path: Path, name: str, shard: int) -> Path:
    """The file of one array of one shard."""
    return path / f"{name}-{shard:06d}.npy"


def open_part(path: Path, name: str, shard: int) -> NDArray[Any]:
    """Memory-map one array of one shard."""
    return open_array(path, part_path(path, name, shard).stem)


@contextmanager
def array_writer(path: Path) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Write an .npy file atomically, block by block, at least one; all have the type of the first, and its shape but for the rows."""
    header: dict[str, Any] = {}
    with atomic_file(path) as file:

        def write(block: NDArray[Any]) -> None:
            if not header:
                header.update(descr=np.lib.format.dtype_to_descr(block.dtype), fortran_order=False, shape=(0, *block.shape[1:]))
                np.lib.format.write_array_header_1_0(file, header)
            header["shape"] = (header["shape"][0] + len(block), *block.shape[1:])
            file.write(np.ascontiguousarray(block).data)

        yield write
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)  # as long as before: numpy leaves room for any number of rows


def join_arrays(path: Path, blocks: Iterable[NDArray[Any]]) -> None:
    """Write blocks, one after another, as one .npy file."""
    with array_writer(path) as write:
        for block in blocks:
            write(block)
