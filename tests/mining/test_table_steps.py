"""Tables of different settings side by side: none is lost, none is made twice, whatever is killed when."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mining_world import ALL, World, files_of, mine, with_mining

from orl_fast.errors import DataError
from orl_fast.mining.executor import Executor
from orl_fast.tables import UNFINISHED, find_table, table_info

SMALL = with_mining(min_side_px=20)


def kinds(folder: Path) -> set[str]:
    return {path.name.partition("@")[0] + "@" * ("@" in path.name) for path in folder.iterdir() if path.is_dir()}


def tables(folder: Path) -> dict[str, bytes]:
    """The current tables. RoI features stay aside as long as nothing needs them."""
    return {name: data for name, data in files_of(folder).items() if "@" not in name and not name.startswith("roi-features")}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_tables_of_other_settings_stay_and_come_back(world: World, mined: Path, copy: Path, messages: list[str]):
    before = {kind: times(copy / kind) for kind in kinds(copy) - {"roi-features"}}
    first = {kind: table_info(copy / kind) for kind in before}
    mine(world, copy, ALL, config=SMALL)
    changed = ("rois", "pairs", "patches")
    assert kinds(copy) == {*before, "roi-features", "roi-features@", *(f"{kind}@" for kind in changed)}
    for kind, info in first.items():
        path = find_table(copy, kind, info.fingerprint)
        assert path == copy / (f"{kind}@{info.fingerprint}" if kind in changed else kind)
        assert times(path) == before[kind]
    aside = copy / f"rois@{first['rois'].fingerprint}"
    assert f"rois: the former table is now {aside}; remove it if it is not needed" in messages
    messages.clear()
    mine(world, copy, ALL)
    assert {kind: times(copy / kind) for kind in before} == before
    assert f"rois: back from {aside}" in messages
    assert find_table(copy, "pairs", "0123456789abcdef") is None
    messages.clear()
    mine(world, copy, ALL, config=SMALL)  # back again: nothing is encoded
    assert not [message for message in messages if message.startswith("RoI features")]
    assert find_table(copy, "rois", first["rois"].fingerprint) == aside


def test_a_table_aside_that_holds_more_serves(world: World, copy: Path):
    mine(world, copy, config=with_mining(num_neighbors=5, pair_ratio=0.5))
    more = table_info(copy / "pairs")
    mine(world, copy, config=with_mining(num_neighbors=2, min_side_px=20))
    mine(world, copy, config=with_mining(num_neighbors=2))
    assert table_info(copy / "pairs") == more


class Failing(Executor):
    """Fails after some tasks."""

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for number, task in enumerate(tasks):
            if number == 2:
                raise DataError("stopped")
            yield function(task)


def test_unfinished_work_moves_aside_and_is_resumed(world: World, mined: Path, copy: Path, messages: list[str]):
    other = with_mining(proposal_seed=5)
    with pytest.raises(DataError, match="stopped"):
        mine(world, copy, config=other, executor=Failing())
    done = times(copy / "proposals")
    assert UNFINISHED in done
    assert "counts-000001.npy" in done
    mine(world, copy, ALL)
    assert tables(copy) == tables(mined)
    messages.clear()
    mine(world, copy, ["proposals"], config=other)
    assert "proposals: resuming" in messages
    after = times(copy / "proposals")
    assert all(after[name] == done[name] for name in done if name != UNFINISHED)
    assert table_info(copy / "proposals").settings["seed"] == 5


def test_work_that_was_not_begun_leaves_nothing_aside(world: World, copy: Path):
    class Unable(Executor):
        def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
            raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        mine(world, copy, ["proposals"], config=with_mining(proposal_seed=5), executor=Unable())
    mine(world, copy, ["proposals"])
    assert kinds(copy) >= {"proposals"}
    assert "proposals@" not in kinds(copy)


def test_what_is_no_table_is_left_alone(world: World, tmp_path: Path):
    (tmp_path / "proposals").mkdir()
    mine(world, tmp_path, ["proposals"])  # an empty folder is in nobody's way
    (tmp_path / "rois").mkdir()
    (tmp_path / "rois" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="rois: holds no table of orl-fast; move it elsewhere"):
        mine(world, tmp_path, ["rois"])
    assert (tmp_path / "rois" / "notes.txt").read_text() == "mine"
    (tmp_path / "proposals" / "table.json").rename(tmp_path / "proposals" / UNFINISHED)
    (tmp_path / "proposals" / UNFINISHED).write_text("{")
    with pytest.raises(DataError, match=r"unfinished.json: damaged .* remove"):
        mine(world, tmp_path, ["proposals"])


# Imports once, then starts and kills a child again and again, each with the other settings.
SWITCHER = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from mining_world import ALL, CONFIG, with_mining
from orl_fast.mining.pipeline import Stage
from orl_fast.tables import find_table, table_info
from orl_fast.shards import ShardIndex

folder, settings = Path({folder!r}), [with_mining(min_side_px=20), CONFIG]
known = {{path.name: table_info(path).fingerprint for path in folder.iterdir() if path.is_dir()}}
names = lambda: sorted(name for _, folders, files in os.walk(folder) for name in (*folders, *files))
kills = 0
for attempt in range(14):
    child = os.fork()
    if not child:
        index = ShardIndex.open(Path({shards!r}))
        Stage(index=index, folder=folder, config=settings[attempt % 2], checkpoint=Path({checkpoint!r})).run(ALL)
        os._exit(0)
    seen, status = names(), (0, 0)
    while names() == seen and status == (0, 0):
        time.sleep(0.0002)
        status = os.waitpid(child, os.WNOHANG)
    if status == (0, 0) and attempt < 12:
        time.sleep([0, 0.001, 0.005, 0.02, 0.08, 0.2][attempt // 2])
        os.kill(child, signal.SIGKILL)
    status = status if status != (0, 0) else os.waitpid(child, 0)
    kills += status[1] == signal.SIGKILL
    assert all(find_table(folder, kind, fingerprint) for kind, fingerprint in known.items()), names()
    assert attempt < 12 or status[1] == 0
print(kills)
"""


def test_a_kill_while_settings_change_loses_no_table(world: World, mined: Path, copy: Path):
    paths = {"tests": Path(__file__).parent, "folder": copy, "shards": world.shards, "checkpoint": world.checkpoint}
    script = SWITCHER.format(**{name: str(path) for name, path in paths.items()})
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6, done.stdout
    assert tables(copy) == tables(mined)
    straight = copy.parent / f"{copy.name}-straight"
    mine(world, copy, ALL, config=SMALL)
    mine(world, straight, ALL, config=SMALL)
    assert tables(copy) == tables(straight)
