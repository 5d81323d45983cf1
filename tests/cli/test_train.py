"""`orl-fast train` as a person runs it: which stage, which recipe, the output, and the exit codes."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from orl_fast.checkpoint import CHECKPOINT, read_header
from orl_fast.cli.main import main
from orl_fast.files import locked
from orl_fast.methods import METHODS
from orl_fast.recipe import config_to_toml, load_config
from orl_fast.shards import ShardIndex
from tests.conftest import pack
from tests.train.conftest import after_step, run_config, write_tables

BYOL, ORL = Path("runs/twelve/byol"), Path("runs/twelve/orl")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def packed(photo_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return pack(photo_paths[:12], tmp_path_factory.mktemp("cli") / "twelve")


@pytest.fixture
def orl_fast(packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, in a folder of its own that holds shards/twelve and small.toml."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed.path, "shards/twelve")
    Path("small.toml").write_text(config_to_toml(run_config(epochs=2)))

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["orl-fast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return Done(code, output.out, output.err)

    return run


def _mine(packed: ShardIndex) -> None:
    write_tables(Path("shards/twelve/mined"), index=packed.fingerprint, heights=packed.heights, widths=packed.widths)


def test_the_stages_follow_each_other(orl_fast: Command, packed: ShardIndex) -> None:
    done = orl_fast("train", "--recipe", "small.toml", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out == "byol is finished: 6 steps, runs/twelve/byol/checkpoint.pt. Next: orl-fast mine shards/twelve\n"
    assert "stage 1, BYOL: nothing is mined yet in shards/twelve/mined" in done.err
    assert "recipe: small.toml" in done.err
    assert orl_fast("train", "--device", "cpu").out.startswith("byol was already finished: 6 steps")

    _mine(packed)
    done = orl_fast("train", "twelve", "--device", "cpu")
    assert done.code == 0, done.err
    assert (
        done.out
        == "orl is finished: 6 steps, runs/twelve/orl/checkpoint.pt. Next: orl-fast eval probe runs/twelve/orl/checkpoint.pt FOLDER\n"
    )
    assert "stage 3, ORL: pairs are there in shards/twelve/mined" in done.err
    assert "mined from another encoder than runs/twelve/byol/checkpoint.pt" in done.err
    assert "recipe: runs/twelve/byol/recipe.toml, with mining.num_neighbors=3, mining.pair_ratio=0.1" in done.err
    assert load_config(ORL / "recipe.toml") == load_config("small.toml") == load_config(BYOL / "recipe.toml")


def test_the_run_at_hand_is_resumed_with_its_own_recipe(orl_fast: Command, packed: ShardIndex) -> None:
    """The review's 4.12, as a person meets it."""
    _mine(packed)
    start = ("train", "--method", "orl", "--device", "cpu")
    done = orl_fast(*start, "--recipe", "small.toml", "--set", "mining.num_neighbors=1", "--max-steps", 2)
    assert done.code == 0, done.err
    assert done.out == "Stopped after step 2 of 6, saved in runs/twelve/orl; run the same command to resume.\n"
    done = orl_fast(*start)
    assert done.code == 0, done.err
    assert "configuration: of the run in runs/twelve/orl" in done.err
    assert "resuming from step 2 of 6" in done.err
    assert done.out.startswith("orl is finished: 6 steps")
    assert read_header(ORL / CHECKPOINT)["config"]["mining"]["num_neighbors"] == 1


def test_what_is_set_goes_before_options_before_the_recipe(orl_fast: Command) -> None:
    options = ("--recipe", "small.toml", "--epochs", 1, "--renderer", "reference", "--set", "lr_per_256=0.7", "--out", "elsewhere/run")
    done = orl_fast("train", *options, "--device", "cpu")
    assert done.code == 0, done.err
    assert "recipe: small.toml, with train.epochs=1, loader.renderer=reference, lr_per_256=0.7" in done.err
    assert done.out.startswith("byol is finished: 3 steps, elsewhere/run/checkpoint.pt")
    header = read_header(Path("elsewhere/run") / CHECKPOINT)
    assert (header["renderer"], header["config"]["optim"]["lr_per_256"]) == ("reference", 0.7)
    assert not Path("runs").exists()
    longer = orl_fast("train", *options, "--set", "train.epochs=2", "--restart", "--max-steps", 1)
    assert "Stopped after step 1 of 6" in longer.out


def test_restart_discards_the_run(orl_fast: Command) -> None:
    orl_fast("train", "--recipe", "small.toml", "--max-steps", 1)
    refused = orl_fast("train", "--set", "lr_per_256=0.7")
    assert refused.code == 1
    assert "optim.lr_per_256 = 0.2 then, 0.7 now); start from scratch with --restart" in refused.err
    done = orl_fast("train", "--recipe", "small.toml", "--set", "lr_per_256=0.7", "--restart", "--max-steps", 2)
    assert done.code == 0, done.err
    assert "resuming" not in done.err
    assert "Stopped after step 2 of 6" in done.out


def test_a_signal_saves_and_is_the_exit_code(orl_fast: Command) -> None:
    with after_step(1, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        done = orl_fast("train", "--recipe", "small.toml")
    assert done.code == 128 + signal.SIGTERM
    assert done.out == "Stopped after step 2 of 6, saved in runs/twelve/byol; run the same command to resume.\n"
    assert "SIGTERM: finishing the step and saving; a second signal exits immediately" in done.err
    assert orl_fast("train").out.startswith("byol is finished")


def test_quiet_shows_results_alone(orl_fast: Command) -> None:
    done = orl_fast("-q", "train", "--recipe", "small.toml", "--max-steps", 1)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Stopped after step 1")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "simclrr"], 1, f"Error: --method simclrr: use one of {', '.join(METHODS)}"),
        (["--method", "orl"], 1, "there is no pairs table; run orl-fast mine shards/twelve"),
        (["--recipe", "smal.toml"], 1, "neither a shipped recipe nor a TOML file"),
        (["--recipe", "small.toml", "--set", "train.epoch=2"], 1, "did you mean 'train.epochs'?"),
        (["--recipe", "small.toml", "--set", "batch_size=13"], 1, "the data holds only 12 images"),
        (["--recipe", "small.toml", "--renderer", "gpu", "--device", "cpu"], 1, "this run has no CUDA device"),
        (["elsewhere"], 1, "elsewhere"),
        (["--renderer", "gpuu"], 2, "Invalid value for '--renderer'"),
        (["--max-steps", "0"], 2, "Invalid value for '--max-steps'"),
        (["--device", "tpu"], 2, "Invalid value for '--device'"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(arguments: list[str], code: int, message: str, orl_fast: Command) -> None:
    done = orl_fast("train", *arguments)
    assert done.code == code
    assert message in done.err
    assert done.out == ""
    assert not Path("runs").exists()


def test_a_folder_that_another_process_writes_is_refused(orl_fast: Command) -> None:
    with locked(BYOL, what="orl-fast train"):
        done = orl_fast("train", "--recipe", "small.toml")
    assert done.code == 1
    assert f"Error: runs/twelve/byol: orl-fast train (process {os.getpid()} on " in done.err
    assert "is writing here; wait for it to end, or choose another folder" in done.err


def test_several_data_sets_must_be_named(orl_fast: Command) -> None:
    shutil.copytree("shards/twelve", "shards/other")
    done = orl_fast("train")
    assert done.code == 1
    assert "several data sets (other, twelve); name the one to use" in done.err
