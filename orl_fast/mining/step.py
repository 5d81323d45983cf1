"""A step of mining: what its table is made from, and how it is made, shard by shard, by all processes together.

While it is made, the table's folder holds one file per shard and `unfinished.json`. `table.json` is written last: without it, the folder is
no table. The main process decides for all whether a table is current and which shards are left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from orl_fast.console import log, progress
from orl_fast.files import atomic_folder
from orl_fast.mining.executor import Executor
from orl_fast.mining.parts import part_path
from orl_fast.provenance import UNFINISHED, TableInfo, activate, table_info, tables_of, write_info


@dataclass(frozen=True, kw_only=True)
class Step:
    """A table to make.

    Attributes:
        info: what it is made from.
        work: makes the files of some shards, and yields now and then how much of `sizes` was done since.
        sizes: [S] the amount of work in each shard, in `unit`.
        last: the array whose file marks a shard as done; by default it is named after the table.
        finish: joins the shards' files into the table's arrays; None where they are the arrays.
        check: called with the shards that are left, before any work.
        needs: tables that the work reads and that nothing else does: made only if this one has to be made.
    """

    info: TableInfo
    work: Callable[[Sequence[int]], Iterator[int]]
    sizes: Sequence[int]
    unit: str = "images"
    last: str = ""
    finish: Callable[[], None] | None = None
    check: Callable[[Sequence[int]], None] | None = None
    needs: Sequence["Step"] = ()

    def is_current(self, mined: Path) -> bool:
        """Whether there is nothing to do."""
        path = mined / self.info.kind
        return _serves(table_info(path), self.info) and not (path / UNFINISHED).exists()

    def run(self, mined: Path, executor: Executor) -> None:
        """Make the table below `mined`, unless one that serves exists, current or aside. An earlier run's work on it is kept."""
        if executor.decide(partial(self._recall, mined)):
            log.info("%s: up to date", self.info.kind)
            return
        for needed in self.needs:
            needed.run(mined, executor)
        waiting = executor.decide(partial(self._prepare, mined))
        finished = sorted(set(range(len(self.sizes))) - set(waiting))
        left, done = (sum(self.sizes[shard] for shard in executor.own(shards)) for shards in (waiting, finished))
        title = self.info.kind + (f" (1 of {executor.num_shares} shares)" if executor.num_shares > 1 else "")
        bar = progress(title, total=left + done, unit=self.unit, done=done) if executor.is_main else nullcontext(_silent)
        with bar as advance:
            for count in self.work(executor.own(waiting)):
                advance(count)
        executor.barrier()
        executor.decide(partial(self._finish, mined))

    def _recall(self, mined: Path) -> bool:
        """Make a table that serves the current one, if there is one."""
        found = next((info for info in tables_of(mined, self.info.kind) if _serves(info, self.info)), None)
        if found is not None:
            activate(mined / self.info.kind, found.fingerprint)
            self._clean(mined / self.info.kind)
        return found is not None

    def _prepare(self, mined: Path) -> list[int]:
        """Make room for the table, and list the shards that are left to do."""
        path, info = mined / self.info.kind, self.info
        activate(path, info.fingerprint)
        if path.exists():
            log.info("%s: resuming", info.kind)
        else:
            with atomic_folder(path) as folder:
                write_info(folder, info, name=UNFINISHED)
        waiting = [shard for shard in range(len(self.sizes)) if not part_path(path, self.last or info.kind, shard).exists()]
        if self.check is not None:
            self.check(waiting)
        return waiting

    def _finish(self, mined: Path) -> None:
        if self.finish is not None:
            self.finish()
        write_info(mined / self.info.kind, self.info)
        self._clean(mined / self.info.kind)

    def _clean(self, path: Path) -> None:
        """Remove what a finished table has no use for; the mark of the unfinished one last."""
        if (path / UNFINISHED).exists():
            parts = path.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].npy") if self.finish is not None else ()
            for file in (*path.glob("*.partial"), *parts, path / UNFINISHED):
                file.unlink()


def _silent(_: int) -> None:
    return None


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
