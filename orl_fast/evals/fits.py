"""Many fits of SVMs in processes: what is finished is kept, so that a killed run loses the fits in progress."""

import importlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from orl_fast.console import human_time, log
from orl_fast.errors import DataError
from orl_fast.evals.svm import MAX_STEPS, Basis, write_basis
from orl_fast.memory import available_memory
from orl_fast.shards.workers import run_in_workers
from orl_fast.signals import stop_signals

_PROCESS_BYTES = 400 << 20  # of a worker before it has data
_WORTH_PROCESSES_S = 20.0  # they take some seconds to start


class Task(Protocol):
    """What a function of `orl_fast.evals.svm` takes. The key names the result, which depends on nothing else."""

    @property
    def key(self) -> str: ...


AnyTask = TypeVar("AnyTask", bound=Task)


class Level:
    """One level's features [N, D] and [M, D], written for the workers when a task first needs them."""

    def __init__(self, train: NDArray[np.float32], test: NDArray[np.float32], folder: Path) -> None:
        self._parts, self._folder = (train, test), folder
        self.basis = Basis(train=folder / "train.npy", test=folder / "test.npy")
        self.num_bytes = 8 * len(train) * min(train.shape)  # of the training matrix

    @classmethod
    @contextmanager
    def open(cls, train: NDArray[np.float32], test: NDArray[np.float32], folder: Path) -> Iterator["Level"]:
        """`folder` is this level's alone, and is gone after the block."""
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield cls(train, test, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self) -> None:
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            write_basis(*self._parts, self.basis)


class Results:
    """Results by key, kept as lines of a file."""

    def __init__(self, path: Path, *, num_workers: int) -> None:
        self._path, self._num_workers = path, num_workers
        self._found: dict[str, dict[str, Any]] = {}
        self._used: set[str] = set()
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
                self._found[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                log.warning("%s: a line that is not whole; its fit is repeated", path)

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    @property
    def num_unconverged(self) -> int:
        """Tasks of this run with a fit that took the most steps allowed."""
        return sum(self._found[key]["steps"] >= MAX_STEPS for key in self._used)

    def count(self, keys: Iterable[str]) -> int:
        """How many of them are there."""
        return sum(key in self._found for key in keys)

    def run(
        self,
        function: Callable[[AnyTask], dict[str, Any]],
        tasks: Sequence[AnyTask],
        level: Level,
        advance: Callable[..., None],
        *,
        ahead: Sequence[float] = (0,),
        num_levels: int = 1,
    ) -> None:
        """Compute what is missing, in as many processes as cores and memory allow. `advance` is called after each.

        As many tasks as there are numbers in `ahead` are run first, in this process. Each number is how many tasks like that one are to be
        done, on all of `num_levels` levels: the time for them is logged.

        DataError: the disk is full, or a process was killed; KeyboardInterrupt: after SIGINT or SIGTERM, once a fit has ended.
        """
        self._used |= {task.key for task in tasks}
        remaining = [task for task in tasks if task.key not in self._found]
        if not remaining:
            return
        for module in ("svm", "model_selection", "metrics"):  # not to be measured
            importlib.import_module(f"sklearn.{module}")
        with self._lines() as write, stop_signals() as stop:

            def keep(record: dict[str, Any]) -> None:
                write(record)
                advance()
                if stop:
                    raise KeyboardInterrupt

            times_s = [time.monotonic()]
            level.write()
            times_s.append(time.monotonic())
            for task in remaining[: len(ahead)]:
                keep(_with_key(function, task))
                times_s.append(time.monotonic())
            written_s, *taken_s = np.diff(times_s).tolist()
            remaining = remaining[len(ahead) :]
            # Of the training matrix, a worker holds a part, and LIBLINEAR's copy of that with 16 bytes for each number.
            memory = available_memory() // (_PROCESS_BYTES + 3 * level.num_bytes)
            num_workers = max(1, min(self._num_workers, len(remaining), memory))
            if any(ahead):
                work_s = sum(num * taken for num, taken in zip(ahead, taken_s, strict=False))
                total = human_time(num_levels * written_s + work_s / num_workers)
                log.info("the SVMs take about %s in %d processes, judged by the first (%.2f s)", total, num_workers, taken_s[0])
            if max(taken_s) * len(remaining) < _WORTH_PROCESSES_S:
                num_workers = 1
            for record in run_in_workers(partial(_with_key, function), remaining, num_workers=num_workers):
                keep(record)

    @contextmanager
    def _lines(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yields what keeps a record."""
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("ab", buffering=0) as lines:
            if not whole:
                lines.write(b"\n")

            def write(record: dict[str, Any]) -> None:
                self._found[record["key"]] = record
                try:
                    lines.write(json.dumps(record).encode() + b"\n")
                except OSError as error:
                    remedy = "free some space and run the same command again to resume"
                    raise DataError(f"{self._path}: cannot be written ({error.strerror}); {remedy}") from error

            yield write


def _with_key(function: Callable[[AnyTask], dict[str, Any]], task: AnyTask) -> dict[str, Any]:
    return {"key": task.key, **function(task)}
