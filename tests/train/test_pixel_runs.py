"""A run may be begun from JPEGs and resumed from pixels: they are the same images. Smaller images are not."""

import shutil
from pathlib import Path

import pytest
import torch

from orl_fast.checkpoint import CHECKPOINT, read_checkpoint
from orl_fast.errors import StaleError
from orl_fast.shards import ShardIndex
from orl_fast.shards.pixels import INFO_NAME, WORK_NAME, write_pixels
from tests.train.conftest import EACH_EPOCH, run_config, train_run


@pytest.fixture
def index(packed: ShardIndex, tmp_path: Path) -> ShardIndex:
    """A copy of the packed photographs, so that others do not find its pixels."""
    return ShardIndex.open(Path(shutil.copytree(packed.path, tmp_path / "packed")))


@pytest.mark.parametrize("budget", [None, 4_000_000])
@pytest.mark.parametrize("with_tables", [False, True])
def test_weights_do_not_depend_on_where_pixels_come_from(
    with_tables: bool, budget: int | None, index: ShardIndex, mined: Path, tmp_path: Path
) -> None:
    tables = mined if with_tables else None
    config = run_config(*EACH_EPOCH, epochs=2)
    train_run(index, tmp_path / "jpegs", config, mined=tables)
    train_run(index, tmp_path / "both", config, mined=tables, max_steps=2)  # within an epoch
    info = write_pixels(index, budget_bytes=budget, num_workers=1)
    assert (info.num_stored == len(index)) == (budget is None)
    train_run(index, tmp_path / "both", config, mined=tables, max_steps=4)
    train_run(index, tmp_path / "both", run_config(*EACH_EPOCH, "loader.pixels=never", epochs=2), mined=tables)
    a, b = (read_checkpoint(tmp_path / name / CHECKPOINT) for name in ("jpegs", "both"))
    assert (a["step"], b["step"]) == (6, 6)
    assert all(torch.equal(a["model"][name], value) for name, value in b["model"].items())
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()


def test_smaller_images_are_another_run(index: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(*EACH_EPOCH, epochs=2)
    train_run(index, tmp_path / "run", config, max_steps=3)
    write_pixels(index, max_side=200, num_workers=1)
    with pytest.raises(StaleError, match=rf"trained on shards {index.fingerprint}, these are .* with 12 images of at most 200 px"):
        train_run(index, tmp_path / "run", config)
    train_run(index, tmp_path / "run", run_config(*EACH_EPOCH, "loader.pixels=never", epochs=2))
    train_run(index, tmp_path / "smaller", config, max_steps=3)
    assert "sides of at most 200 px; views are cut from these, not from the JPEGs" in caplog.text


def test_pixels_that_do_not_fit_are_reported_once(index: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pixels(index, num_workers=1)
    (index.path / INFO_NAME).unlink()  # as where packing them was killed
    (index.path / WORK_NAME).mkdir()
    train_run(index, tmp_path / "run", run_config(*EACH_EPOCH, epochs=2), max_steps=1)
    assert caplog.text.count("are not finished; run orl-fast pixels") == 1
