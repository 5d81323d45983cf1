"""Options of an evaluation as options of its command, and records next to the checkpoint."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from orl_fast.cli.eval import _checked, _option
from orl_fast.config import Count, Section
from orl_fast.console import log
from orl_fast.evals.evaluate import _append


class Options(Section):
    needed: int = Field(ge=1, multiple_of=2, description="Must be given.")
    flip: bool = Field(default=True, description="A switch.")
    kind: Literal["a", "b"] | None = None
    count: Count = 3
    made: int = Field(default_factory=lambda: 4)
    share: float = Field(default=0.5, gt=0, lt=1)


def _parse(*arguments: str) -> Any:
    found: list[Section] = []
    options = [_option(name, info) for name, info in Options.model_fields.items()]
    command = click.Command("test", params=[*options], callback=lambda **values: found.append(_checked(Options, values)))
    result = CliRunner().invoke(command, arguments)
    return found[0] if found else (result.exit_code, result.output)


def test_every_kind_of_field_is_an_option() -> None:
    assert _parse("--needed", "2") == Options(needed=2)
    given = ("--needed", "6", "--no-flip", "--kind", "b", "--count", "5", "--made", "7", "--share", "0.25")
    assert _parse(*given) == Options(needed=6, flip=False, kind="b", count=5, made=7, share=0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "Missing option '--needed'"),
        (("--needed", "0"), "x>=1"),
        (("--needed", "3"), "--needed 3: Input should be a multiple of 2"),
        (("--needed", "2", "--share", "1"), "0<x<1"),
        (("--needed", "2", "--share", "nan"), "--share nan: Input should be a finite number"),
        (("--needed", "2", "--kind", "c"), "'c' is not one of 'a', 'b'"),
    ],
)
def test_what_a_field_refuses_is_wrong_usage(given: tuple[str, ...], message: str) -> None:
    exit_code, output = _parse(*given)
    assert exit_code == 2
    assert message in output


def test_records_of_several_writers_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "evals.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: _append(file, {"i": i, "text": "x" * 5000}), range(64)))
    assert sorted(json.loads(line)["i"] for line in file.read_text().splitlines()) == list(range(64))


def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    _append(tmp_path, {"a": 1})
    assert len(messages) == 1
    assert "cannot be written" in messages[0]
