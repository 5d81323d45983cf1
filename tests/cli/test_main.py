"""The command line's frame: instant help, exit codes, messages without tracebacks."""

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from orl_fast.cli import main as main_module
from orl_fast.cli.main import VERBS, cli
from orl_fast.errors import DataError


def _commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            each = command.get_command(click.Context(command), name)
            assert each is not None
            yield from _commands(each)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_explained(verb: str) -> None:
    top = cli.get_command(click.Context(cli), verb)
    assert top is not None
    for command in _commands(top):
        assert command.help
        with click.Context(command, info_name=verb) as context:
            text = " ".join(command.get_help(context).split())
        for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
            assert option.opts[-1] in text
            plain = isinstance(option.type, click.Choice) or option.name in ("seed", "out")
            assert option.help or plain, f"{command.name} {option.opts}"


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, click; from orl_fast.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'nvidia.dali', 'faiss', 'cv2', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Commands" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(DataError("shards/: nothing here; do this"), 1, "Error: shards/: nothing here; do this"), (KeyboardInterrupt(), 130, "Interrupted")],
)
def test_errors_become_one_message(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main_module.cli, "main", fail)
    with pytest.raises(SystemExit) as stop:
        main_module.main()
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err


def test_wrong_usage_is_exit_code_2() -> None:
    done = subprocess.run([sys.executable, "-m", "orl_fast.cli.main", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'trian'. Did you mean 'train'?" in done.stderr
