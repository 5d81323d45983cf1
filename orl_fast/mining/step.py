"""A step of mining: what its table is made from, and how it is made, shard by shard, by all processes together.

While it is made, the table's folder holds the files of single shards, NAME-000000.npy …, which a killed run leaves to the next one, and
`unfinished.json`. `table.json` is written last: without it, the folder is no table. The main process decides for all whether a table is
current and which shards are left.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log, progress
from orl_fast.files import atomic_file, atomic_folder
from orl_fast.mining.executor import Executor
from orl_fast.tables import UNFINISHED, TableInfo, activate, open_array, table_info, tables_of, write_info


@dataclass(frozen=True, kw_only=True)
class Step:
    """A table to make."""

    mined: Path  # the folder of all tables
    info: TableInfo  # what it is made from
    work: Callable[[Sequence[int]], Iterator[int]]  # makes the files of some shards; yields now and then how much of `sizes` it did since
    sizes: Sequence[int]  # [S] the amount of work in each shard, in `unit`
    unit: str = "images"
    last: str = ""  # the array whose file marks a shard as done; by default it is named after the table
    finish: Callable[[], None] | None = None  # joins the shards' files into the table's arrays; None where they are the arrays
    check: Callable[[Sequence[int]], None] | None = None  # called with the shards that are left, before any work
    needs: Sequence["Step"] = ()  # tables that this work alone reads: made only if this one has to be made

    @property
    def path(self) -> Path:
        return self.mined / self.info.kind

    def is_current(self) -> bool:
        """Whether there is nothing to do."""
        return _serves(table_info(self.path), self.info) and not (self.path / UNFINISHED).exists()

    def run(self, executor: Executor) -> None:
        """Make the table, unless one that serves exists, current or aside. An earlier run's work on it is kept."""
        if executor.decide(self._recall):
            log.info("%s: up to date", self.info.kind)
            return
        for needed in self.needs:
            needed.run(executor)
        waiting = executor.decide(self._prepare)
        finished = sorted(set(range(len(self.sizes))) - set(waiting))
        left, done = (sum(self.sizes[shard] for shard in executor.own(shards)) for shards in (waiting, finished))
        title = self.info.kind + (f" (1 of {executor.num_shares} shares)" if executor.num_shares > 1 else "")
        bar = progress(title, total=left + done, unit=self.unit, done=done) if executor.is_main else nullcontext()
        with bar as advance:
            for count in self.work(executor.own(waiting)):
                if advance is not None:
                    advance(count)
        executor.barrier()
        executor.decide(self._finish)

    def _recall(self) -> bool:
        """Make a table that serves the current one, if there is one."""
        found = next((info for info in tables_of(self.mined, self.info.kind) if _serves(info, self.info)), None)
        if found is not None:
            activate(self.path, found.fingerprint)
            self._clean()
        return found is not None

    def _prepare(self) -> list[int]:
        """Make room for the table, and list the shards that are left to do."""
        activate(self.path, self.info.fingerprint)
        if self.path.exists():
            log.info("%s: resuming", self.info.kind)
        else:
            with atomic_folder(self.path) as folder:
                write_info(folder, self.info, name=UNFINISHED)
        last = self.last or self.info.kind
        waiting = [shard for shard in range(len(self.sizes)) if not part_path(self.path, last, shard).exists()]
        if self.check is not None:
            self.check(waiting)
        return waiting

    def _finish(self) -> None:
        if self.finish is not None:
            self.finish()
        write_info(self.path, self.info)
        self._clean()

    def _clean(self) -> None:
        """Remove what a finished table has no use for; the mark of the unfinished one last."""
        if (self.path / UNFINISHED).exists():
            parts = self.path.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].npy") if self.finish is not None else ()
            for file in (*self.path.glob("*.partial"), *parts, self.path / UNFINISHED):
                file.unlink()


def _serves(found: TableInfo | None, wanted: TableInfo) -> bool:
    """Whether a table holds at least what is wanted, which is then a prefix of each of its entries (see `PairTable.limited`)."""
    if found is None:
        return False
    have = dict(found.settings)
    for name in {"num_neighbors", "pair_ratio"} & have.keys() & wanted.settings.keys():
        have[name] = min(have[name], wanted.settings[name])
    if have.get("compat") == "paper":  # a share of all entries includes the official share
        have["compat"] = wanted.settings["compat"]
    return replace(found, settings=have) == wanted


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
