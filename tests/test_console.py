"""A terminal gets progress bars, everything else plain lines."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from orl_fast.console import human_time

SCRIPT = """
from orl_fast import console
console._PLAIN_EVERY_S = 0
console.set_up_logging()
console.log.info("hello [red]")
with console.progress("pack", total=3, unit="images", done=1) as advance:
    advance(2, note="noted")
"""
COMMAND = [sys.executable, "-c", SCRIPT]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_file_gets_lines_whatever_the_environment_says(variable: str) -> None:
    done = subprocess.run(COMMAND, env={**os.environ, variable: "1"}, stderr=subprocess.PIPE, check=True, text=True)
    assert "\x1b" not in done.stderr
    first, second = done.stderr.splitlines()
    assert first.endswith("hello [red]")
    assert "pack: 3 of 3" in second
    assert second.endswith("noted")


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(COMMAND, env=environment, stderr=theirs) as process:
        assert process.wait(timeout=60) == 0
    os.close(theirs)
    text = b""
    with suppress(OSError):  # EIO ends what a terminal has to give
        while block := os.read(ours, 4096):
            text += block
    os.close(ours)
    assert b"\x1b" in text
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", text).decode()
    assert "hello [red]" in plain
    assert "3/3" in plain
    assert "noted" in plain


def test_times_are_readable() -> None:
    times = [human_time(seconds) for seconds in (-1, 42.4, 99, 100, 5_940, 11_100, 200_000)]
    assert times == ["0 s", "42 s", "99 s", "2 min", "99 min", "3 h 05 min", "2.3 days"]
