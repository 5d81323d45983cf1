"""How OpenMP's threads wait for each other while a model trains on the CPU: awake on cores that are idle otherwise, asleep on busy ones.

A training step has hundreds of parallel regions of a fraction of a millisecond. To put a thread to sleep and wake it after each takes about
as long as the region itself; but a thread that waits awake on a core that others want takes time from the very threads that it waits for.
Results do not depend on it.
"""

import os
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from orl_fast.cores import cpu_times, num_cores

# libgomp lets threads spin this often, some 100 microseconds, before they sleep; but with a passive policy not at all while a process has
# more OpenMP threads than cores, however few of them have work.
_SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
_PERIOD_S = 0.25
_BUSY_CORES = 0.25  # used by others
_QUIET_PERIODS = 4  # in a row, before threads wait awake again


def allow_spinning(environment: MutableMapping[str, str]) -> None:
    """Set what libgomp reads when torch is imported, unless a user has set it."""
    if not _SPINNING.keys() & environment.keys():
        environment.update(_SPINNING)


@contextmanager
def spinning_while_idle() -> Iterator[None]:
    """Watch the cores during the block, and let OpenMP's threads spin while no other process uses them; see `allow_spinning`."""
    if num_cores() < 2 or any(os.environ.get(name) != value for name, value in _SPINNING.items()):
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="spin", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event) -> None:
    idle_now: threading.Event | None = _asleep()
    quiet, before = 0, cpu_times()
    while not ended.wait(_PERIOD_S):
        after = cpu_times()
        used_by_others = (after.busy_s - before.busy_s - (after.own_s - before.own_s)) / max(after.wall_s - before.wall_s, 1e-3)
        before = after
        quiet = quiet + 1 if used_by_others < _BUSY_CORES else 0
        if quiet >= _QUIET_PERIODS and idle_now is not None:
            idle_now.set()
            idle_now = None
        elif not quiet and idle_now is None:
            idle_now = _asleep()
    if idle_now is not None:
        idle_now.set()


def _asleep() -> threading.Event:
    """Have threads sleep while they wait, until the event is set: a second team of OpenMP threads makes them more than there are cores."""
    until, ready = threading.Event(), threading.Event()

    def hold() -> None:
        import torch  # the environment must be set before

        torch.ones(1 << 20).add_(1)  # large enough for all threads
        ready.set()
        until.wait()

    threading.Thread(target=hold, name="second team", daemon=True).start()
    ready.wait(10)
    return until
