"""One function over many tasks in worker processes, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from orl_fast.console import log
from orl_fast.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_workers(function: Callable[[Task], Result], tasks: Iterable[Task], *, num_workers: int) -> Iterator[Result]:
    """Yield results as they are completed, in no fixed order; DataError if a worker process was killed.

    One worker (or none) is this process; more are new processes. Where those cannot share semaphores (no writable /dev/shm), this process
    works alone, with a warning.
    """
    pool, context = None, multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_set_up_worker) if num_workers > 1 else None
    except (OSError, ImportError, NotImplementedError) as error:
        log.warning("worker processes are not available here (%s: is /dev/shm writable?); continuing with one process", error)
    if pool is None:
        yield from map(function, tasks)
        return
    remaining = iter(tasks)
    try:
        running = _submit(pool, function, islice(remaining, 2 * num_workers))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= _submit(pool, function, islice(remaining, len(done)))
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, possibly for lack of memory; run the same command with fewer --workers "
            '(a script that starts workers must do so under if __name__ == "__main__":)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # running tasks end first: whole files, no processes left


def _submit(pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task]) -> set[Future[Result]]:
    """Submitting starts workers: they inherit that SIGINT is blocked (Ctrl-C is for the parent); the parent's own waits until then."""
    interrupts: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    in_main = threading.current_thread() is threading.main_thread()  # its handler runs whichever thread receives the signal
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number)) if in_main else None
    try:
        return {pool.submit(function, task) for task in tasks}
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _set_up_worker() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
