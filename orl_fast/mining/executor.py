"""Where mining runs: an executor maps functions over shard tasks, so that the steps know neither processes nor ranks.

A task reads whole files and writes whole files. Functions, workers and tasks can be pickled, so an executor may run them in other processes
or on other machines that see the same files. Another executor is a subclass in a file of its own and a line in EXECUTORS.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from orl_fast.distributed import decided_in, patient_group
from orl_fast.shards.workers import run_in_workers

Task = TypeVar("Task")
Result = TypeVar("Result")
# Opened once for many tasks: (tasks, device, number of threads) → results, as they come.
Worker = Callable[[Iterable[Task], torch.device, int], Iterator[Result]]


class Executor:
    """Maps work over tasks: this one in worker processes on this machine, device work in this process. Others override what differs.

    Every process that mines runs the same steps; the defaults are those of a single one.
    """

    is_main = True  # whether this process decides, joins and reports
    num_shares = 1  # among how many processes the shards are divided

    def __init__(self, *, device: torch.device | None = None, num_workers: int = 1) -> None:
        self.device, self.num_workers = device or torch.device("cpu"), num_workers  # of this process; workers: its processes, or threads

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield function(task) of each task, in any order: for work on the CPU."""
        return run_in_workers(function, tasks, num_workers=self.num_workers)

    def map_on_devices(self, worker: Worker[Task, Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield the results of all tasks, in any order, from one worker on each device: for encoders, which are slow to open."""
        return worker(tasks, self.device, self.num_workers)

    def own(self, shards: Sequence[int]) -> Sequence[int]:
        """Those of the shards that this process is responsible for."""
        return shards

    def decide(self, function: Callable[[], Result]) -> Result:
        """function() as the main process computes it, known to all: its result, or the OrlFastError that it raised."""
        return function()

    def barrier(self) -> None:
        """Return when every process has called it."""
        return


class Torchrun(Executor):
    """The ranks of torchrun, each with its processes and its device. They wait for one another for days if need be."""

    def __init__(self, *, device: torch.device | None = None, num_workers: int = 1) -> None:
        super().__init__(device=device, num_workers=num_workers)
        self._group = patient_group()
        self._rank, self.num_shares = dist.get_rank(), dist.get_world_size()
        self.is_main = self._rank == 0

    def own(self, shards: Sequence[int]) -> Sequence[int]:
        return shards[self._rank :: self.num_shares]

    def decide(self, function: Callable[[], Result]) -> Result:
        return decided_in(self._group, function, is_main=self.is_main)

    def barrier(self) -> None:
        dist.barrier(self._group)


EXECUTORS: dict[str, Callable[..., Executor]] = {"processes": Executor, "torchrun": Torchrun}
