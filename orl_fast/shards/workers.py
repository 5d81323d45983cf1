"""One function over many tasks in worker processes, and nothing left running when the parent goes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import TypeVar

from orl_fast.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_in_workers(function: Callable[[Task], Result], tasks: Iterable[Task], *, num_workers: int) -> Iterator[Result]:
    """Yield results as they come, in no fixed order. One worker (or none) is this process; more are fresh processes.

    Raises:
        DataError: a worker process was killed.
    """
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    remaining = iter(tasks)
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_set_up_worker)
    try:
        running: set[Future[Result]] = {pool.submit(function, task) for task in islice(remaining, 2 * num_workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, task) for task in islice(remaining, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for lack of memory; run the same command with fewer --workers "
            '(a script of yours that starts workers must do so below if __name__ == "__main__":)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # tasks in work end first: whole files, no strays


def _set_up_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
