"""Signals that ask a long job to stop: it finishes its step, saves, and ends."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from orl_fast.console import log


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append themselves to; a second signal acts as before and exits immediately."""
    received: list[int] = []

    def receive(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])
        log.warning("%s: finishing the step and saving; a second signal exits immediately", signal.Signals(signum).name)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
