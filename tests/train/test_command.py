"""`orl-fast train` as a person runs it, and which run it chooses."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from orl_fast.checkpoint import read_checkpoint, read_header
from orl_fast.cli.main import cli
from orl_fast.console import log
from orl_fast.errors import ConfigError, OrlFastError, StaleError
from orl_fast.mining.executor import Processes
from orl_fast.mining.patches import join_patches, pack_shards
from orl_fast.provenance import TableInfo, activate, new_table, table_info
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, PairTable
from orl_fast.train.run import choose_run
from orl_fast.views.patches import PATCH_SIDE_PX
from tests.synthetic import SMALL
from tests.train.conftest import RUN

RECIPE = [part for override in (*SMALL, *RUN, "epochs=2") for part in ("--set", override)]


@pytest.fixture
def home(packed: ShardIndex, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data set below shards/, nothing mined yet; mined tables are kept aside."""
    shutil.copytree(packed.path, tmp_path / "shards" / "twelve")
    shutil.rmtree(tmp_path / "shards" / "twelve" / "mined", ignore_errors=True)
    shutil.copytree(mined, tmp_path / "aside")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _mine(home: Path) -> Path:
    shutil.copytree(home / "aside", home / "shards" / "twelve" / "mined")
    return home / "shards" / "twelve" / "mined"


def _pack_patches(home: Path) -> None:
    """As orl-fast mine patches does."""
    index, mined = ShardIndex.open(home / "shards" / "twelve"), home / "shards" / "twelve" / "mined"
    rois, pairs = BoxTable.open(mined / "rois"), PairTable.open(mined / "pairs")
    made_from = {"index": index.fingerprint, **{kind: table_info(mined / kind).fingerprint for kind in ("rois", "pairs")}}  # type: ignore[union-attr]
    with new_table(mined / "patches", TableInfo(kind="patches", made_from=made_from, settings={"side_px": PATCH_SIDE_PX})) as folder:
        list(pack_shards(folder, range(index.num_shards), index=index, rois=rois, pairs=pairs, executor=Processes()))
        join_patches(folder, num_shards=index.num_shards)


def _train(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["-q", "train", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit | OrlFastError):
        raise result.exception
    return result


def test_stages_follow_one_another_and_runs_resume(home: Path) -> None:
    first = _train(*RECIPE, "--max-steps", "4")
    assert "Stopped after step 4 of 6, saved in runs/twelve/byol; run the same command to resume." in first.output
    assert first.exit_code == 0
    done = _train(*RECIPE)
    assert "byol is finished: 6 steps, runs/twelve/byol/checkpoint.pt. Next: orl-fast mine shards/twelve" in done.output
    assert "byol was already finished" in _train().output  # its own configuration, without a word of it
    _mine(home)
    stage_3 = _train("--epochs", "1")
    assert "orl is finished: 3 steps, runs/twelve/orl/checkpoint.pt. Next: orl-fast eval probe" in stage_3.output
    header = read_header(home / "runs" / "twelve" / "orl" / "checkpoint.pt")
    assert header["config"]["model"]["backbone"] == "resnet10_small"  # stage 1's recipe
    assert header["config"]["mining"]["num_neighbors"] == 3  # as the pairs were mined
    assert set(header["mined"]) == {"rois", "pairs"}


def test_a_run_is_resumed_with_its_own_configuration(home: Path) -> None:
    """Mined with three neighbors, trained with one."""
    _mine(home)
    arguments = ["--method", "orl", *RECIPE, "--set", "mining.num_neighbors=1"]
    assert _train(*arguments, "--max-steps", "2").exit_code == 0
    resumed = _train("--method", "orl")
    assert "orl is finished: 6 steps" in resumed.output
    assert read_header(home / "runs" / "twelve" / "orl" / "checkpoint.pt")["config"]["mining"]["num_neighbors"] == 1
    other = _train("--method", "orl", "--set", "lr_per_256=0.9")
    assert isinstance(other.exception, StaleError)
    assert "optim.lr_per_256 = 0.2 then, 0.9 now" in str(other.exception)
    assert "--restart" in str(other.exception)
    assert _train("--method", "orl", *RECIPE, "--set", "lr_per_256=0.9", "--restart", "--max-steps", "1").exit_code == 0


def test_patches_packed_while_a_run_exists_do_not_stop_it(home: Path) -> None:
    _mine(home)
    arguments = ["--method", "orl", *RECIPE]
    assert _train(*arguments, "--out", "straight").exit_code == 0
    assert _train(*arguments, "--max-steps", "2").exit_code == 0
    _pack_patches(home)
    assert "orl is finished" in _train("--method", "orl").output
    assert "patches" not in read_header(home / "runs" / "twelve" / "orl" / "checkpoint.pt")["mined"]
    assert (home / "runs" / "twelve" / "orl" / "checkpoint.pt").read_bytes() == (home / "straight" / "checkpoint.pt").read_bytes()
    assert "orl is finished" in _train(*arguments, "--out", "patched").output
    assert "patches" in read_header(home / "patched" / "checkpoint.pt")["mined"]


def test_a_run_is_resumed_with_the_tables_it_began_with(home: Path) -> None:
    """Others were mined meanwhile; those of the run lie aside."""
    mined = _mine(home)
    arguments = ["--method", "orl", *RECIPE]
    assert _train(*arguments, "--out", "straight").exit_code == 0
    assert _train(*arguments, "--max-steps", "2").exit_code == 0
    for kind in ("rois", "pairs"):
        activate(mined / kind, "0123456789abcdef")
        assert not (mined / kind).exists()
    assert "orl is finished" in _train("--method", "orl").output
    for name in ("model", "optimizer"):
        one, other = (read_checkpoint(home / folder / "checkpoint.pt")[name] for folder in ("straight", "runs/twelve/orl"))
        assert str(one) == str(other)
    shutil.rmtree(next(mined.glob("pairs@*")))
    assert isinstance(_train("--method", "orl").exception, StaleError)


def test_the_image_level_alone_needs_no_pairs(home: Path) -> None:
    weights = ["--set", "orl.intra_weight=0", "--set", "orl.inter_weight=0"]
    assert "orl is finished: 6 steps" in _train("--method", "orl", *RECIPE, *weights).output
    assert read_header(home / "runs" / "twelve" / "orl" / "checkpoint.pt")["mined"] == {}


def test_another_renderer_is_refused_and_the_own_one_kept(home: Path) -> None:
    assert _train(*RECIPE, "--max-steps", "2", "--renderer", "reference").exit_code == 0
    assert read_header(home / "runs" / "twelve" / "byol" / "checkpoint.pt")["renderer"] == "reference"
    refused = _train(*RECIPE, "--renderer", "cpu")
    assert isinstance(refused.exception, StaleError)
    assert "leave --renderer out" in str(refused.exception) or "loader.renderer" in str(refused.exception)
    assert "byol is finished" in _train().output
    assert read_header(home / "runs" / "twelve" / "byol" / "checkpoint.pt")["renderer"] == "reference"


def test_wrong_names_are_explained(home: Path) -> None:
    unknown = _train("--method", "byoll")
    assert isinstance(unknown.exception, ConfigError)
    assert "use one of byol, orl" in str(unknown.exception)
    assert "did you mean 'train.epochs'" in str(_train("--set", "train.epoch=3").exception)
    assert not (home / "runs").exists()


def test_patches_of_a_folder_that_is_replaced_are_read_on(home: Path) -> None:
    """A loader holds the folder it opened."""
    mined = _mine(home)
    _pack_patches(home)
    index = ShardIndex.open(home / "shards" / "twelve")
    recipe = home / "recipe.toml"
    recipe.write_text("[mining]\nnum_neighbors = 3\n")
    run = choose_run(index, method="orl", recipe=str(recipe), say=log.debug)
    assert run.mined is not None
    assert run.mined.patches is not None
    os.rename(mined / "patches", mined / "patches@former")
    (mined / "patches").mkdir()
    (mined / "patches" / "patches-000000.tar").write_bytes(b"something else" * 9999)
    assert run.mined.patches.view(0)[:3].tolist() == [0xFF, 0xD8, 0xFF]
    assert load_config(recipe).mining.num_neighbors == 3
    assert np.all(np.diff(run.mined.patch_rows) > 0)
