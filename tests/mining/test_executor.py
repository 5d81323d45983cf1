"""Executors: whatever runs the work, and however often it is killed, the tables are the same."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mining_world import ALL, World, files_of, mine

from orl_fast.errors import DataError
from orl_fast.mining.executor import EXECUTORS, Executor


class Elsewhere(Executor):
    """What an executor on other machines does: functions, workers and tasks arrive there pickled, results come back in another order."""

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        function, tasks = pickle.loads(pickle.dumps((function, list(tasks))))
        yield from pickle.loads(pickle.dumps([function(task) for task in reversed(tasks)]))

    def map_on_devices(self, worker: Callable[..., Iterator[Any]], tasks: Iterable[Any]) -> Iterator[Any]:
        for some in (list(tasks)[1::2], list(tasks)[::2]):  # two devices
            worker, some = pickle.loads(pickle.dumps((worker, some)))
            yield from worker(some, torch.device("cpu"), 1)


@pytest.mark.parametrize("executor", [Elsewhere(), Executor(num_workers=2)])
def test_every_executor_makes_the_same_tables(executor: Executor, world: World, mined: Path, tmp_path: Path):
    mine(world, tmp_path, ALL, executor=executor)
    assert files_of(tmp_path) == files_of(mined)


def test_one_process_decides_alone_and_has_all_shards():
    executor = EXECUTORS["processes"](num_workers=3)
    assert (executor.is_main, executor.num_shares, executor.own([4, 5])) == (True, 1, [4, 5])
    assert executor.decide(lambda: 7) == 7
    with pytest.raises(DataError, match="known to all"):
        executor.decide(_refuse)


def _refuse() -> None:
    raise DataError("known to all")


# Imports once, then starts pairs of ranks as torchrun does. Some pairs lose a rank; the last runs to its end.
RANKS = """
import os, signal, socket, sys, time
from pathlib import Path
from orl_fast.cli.main import cli
from orl_fast.mining import pipeline, step

folder, shards, checkpoint = Path({folder!r}), {shards!r}, {checkpoint!r}

def names():
    return sorted(name for _, folders, files in os.walk(folder) for name in (*folders, *files))

def only_the_main_rank_looks(*_):
    raise AssertionError("rank 1 decides by itself")

def start(rank, port):
    child = os.fork()
    if child:
        return child
    where = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({{name: str(value) for name, value in where.items()}})
    if rank:
        step.tables_of = step.table_info = only_the_main_rank_looks
    try:
        arguments = ["mine", shards, "--checkpoint", checkpoint, "--out", str(folder), "--patches", "--workers", "1", "--device", "cpu"]
        cli(arguments, standalone_mode=False)
    except BaseException as error:
        print("rank", rank, type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def end(child, timeout_s):
    deadline, status = time.monotonic() + timeout_s, (0, 0)
    while status == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
        status = os.waitpid(child, os.WNOHANG)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "still running"
    return os.waitstatus_to_exitcode(status[1])

for attempt, (victim, delay_s) in enumerate([(1, 0.05), (0, 0.3), (1, 0.9), (None, 0)]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen, children = names(), [start(rank, port) for rank in range(2)]
    if victim is not None:
        while names() == seen:
            time.sleep(0.001)
        time.sleep(delay_s)
        os.kill(children[victim], signal.SIGKILL)
    print(*(end(child, 60) for child in children), flush=True)
"""


def test_two_ranks_killed_again_and_again_end_in_the_same_bytes(world: World, mined: Path, tmp_path: Path):
    script = RANKS.format(folder=str(tmp_path / "mined"), shards=str(world.shards), checkpoint=str(world.checkpoint))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ends = [line.split() for line in done.stdout.splitlines()]
    assert "still running" not in done.stdout, done.stderr
    assert sum("-9" in pair for pair in ends[:-1]) >= 2, (ends, done.stderr)  # a rank may be done before it is to be killed
    assert ends[-1] == ["0", "0"], (ends, done.stderr)
    assert "decides by itself" not in done.stderr
    assert "(1 of 2 shares)" not in done.stderr  # nothing took long enough to be reported
    assert files_of(tmp_path / "mined") == files_of(mined)


# A rank whose step is refused by the main one ends with the same message, and neither waits for the other.
REFUSED = """
import os, sys
import torch.distributed as dist
from orl_fast.errors import DataError
from orl_fast.mining.executor import Torchrun

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
executor = Torchrun()
def refuse():
    raise DataError("known to all")
assert executor.own(list(range(5))) == [[0, 2, 4], [1, 3]][int(sys.argv[1])]
assert executor.decide(lambda: sys.argv[1]) == "0"
executor.barrier()
try:
    executor.decide(refuse)
except DataError as error:
    print(error, executor.is_main, executor.num_shares)
dist.destroy_process_group()
"""


def test_ranks_know_what_the_main_one_decided(tmp_path: Path):
    arguments = [[sys.executable, "-c", REFUSED, str(rank), str(tmp_path / "store")] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in arguments]
    printed = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert [words[-2:] for words in printed] == [["True", "2"], ["False", "2"]]
    assert all(words[:3] == ["known", "to", "all"] for words in printed)
