"""Terminal output: log lines and progress bars."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True, highlight=False)
log = logging.getLogger("orl_fast")
_PLAIN_EVERY_S = 15.0


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the package's log to the terminal; called once, by the command line."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log to `path` while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.1f} {task.fields['unit']}/s", style="cyan")


@contextmanager
def progress(description: str, *, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show the rate and remaining time of a long job; yields `advance(count=1, note=None)`.

    A bar on a terminal, otherwise (log files, CI) one line every 15 s. A resumed job passes how much is `done` already.
    """
    if sys.stderr.isatty():  # alone: rich's own check also asks FORCE_COLOR, which is about colors
        note_column = TextColumn("{task.fields[note]}")
        columns = ("{task.description}", BarColumn(bar_width=28), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn(), note_column)
        with Progress(*columns, console=console, speed_estimate_period=60) as bar:
            task = bar.add_task(description, total=total, completed=done, unit=unit, note="")
            yield lambda count=1, note=None: bar.update(task, advance=count, note=note or "")
        return
    start_s = logged_s = time.monotonic()
    now_done = done

    def advance(count: int = 1, note: str | None = None) -> None:
        nonlocal logged_s, now_done
        now_done += count
        now_s = time.monotonic()
        if now_s - logged_s < _PLAIN_EVERY_S:
            return
        logged_s = now_s
        rate = (now_done - done) / (now_s - start_s)
        left = f", {human_time((total - now_done) / rate)} left" if rate > 0 else ""
        tail = f"; {note}" if note else ""
        log.info("%s: %d of %d, %.1f %s/s%s%s", description, now_done, total, rate, unit, left, tail)

    yield advance


def human_time(seconds: float) -> str:
    """'3 h 05 min', for messages."""
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"
