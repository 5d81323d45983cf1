"""`orl-fast train` on tables and patches as stage 2 makes and replaces them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from orl_fast.checkpoint import read_checkpoint, read_header
from orl_fast.cli.main import cli
from orl_fast.console import log
from orl_fast.errors import OrlFastError, StaleError
from orl_fast.mining.executor import Executor
from orl_fast.mining.pairs import join_patches, pack_patches
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex
from orl_fast.tables import TableInfo, activate, new_table, table_info
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
    made_from = {"index": index.fingerprint, **{kind: table_info(mined / kind).fingerprint for kind in ("rois", "pairs")}}  # type: ignore[union-attr]
    with new_table(mined / "patches", TableInfo(kind="patches", made_from=made_from, settings={"side_px": PATCH_SIDE_PX})) as folder:
        list(pack_patches(folder, range(index.num_shards), index=index, executor=Executor()))
        join_patches(folder, num_shards=index.num_shards)


def _train(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["-q", "train", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit | OrlFastError):
        raise result.exception
    return result


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


def test_patches_of_a_folder_that_is_replaced_are_read_on(home: Path) -> None:
    """A loader holds the folder it opened."""
    mined = _mine(home)
    _pack_patches(home)
    index = ShardIndex.open(home / "shards" / "twelve")
    recipe = home / "recipe.toml"
    recipe.write_text("[mining]\nnum_neighbors = 3\n")
    run = choose_run(index, method="orl", recipe=str(recipe), announce=log.debug)
    assert run.mined is not None
    assert run.mined.patches is not None
    os.rename(mined / "patches", mined / "patches@former")
    (mined / "patches").mkdir()
    (mined / "patches" / "patches-000000.tar").write_bytes(b"something else" * 9999)
    assert run.mined.patches.view(0)[:3].tolist() == [0xFF, 0xD8, 0xFF]
    assert load_config(recipe).mining.num_neighbors == 3
    assert np.all(np.diff(run.mined.patch_rows) > 0)
