"""The last two checkpoints, and what a run is resumed from when one is damaged or another run's."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orl_fast.checkpoint import CHECKPOINT, PREVIOUS, earlier_run, read_checkpoint, read_header, write_checkpoint
from orl_fast.errors import DataError, StaleError
from orl_fast.shards import ShardIndex
from orl_fast.train import loop
from orl_fast.train.loop import Outcome
from tests.conftest import pack
from tests.ranks import start_rank
from tests.train.conftest import EACH_EPOCH, run_config, train_run

_PROGRAM = Path(__file__).with_name("one_rank.py")


@pytest.fixture(scope="module")
def nine_steps(packed: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, stopped a step before its end: checkpoints after steps 6 and 8."""
    folder = tmp_path_factory.mktemp("nine")
    train_run(packed, folder, run_config(*EACH_EPOCH, epochs=3), max_steps=8)
    return folder


@pytest.fixture
def run(nine_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nine_steps, tmp_path / "run"))


def _steps(folder: Path) -> list[int]:
    return [read_checkpoint(folder / name)["step"] for name in (CHECKPOINT, PREVIOUS)]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


_DAMAGES = [_flip, _cut, _empty]


def test_the_last_two_are_kept(run: Path, packed: ShardIndex, straight: bytes) -> None:
    assert _steps(run) == [8, 6]
    train_run(packed, run, run_config(*EACH_EPOCH, epochs=3))
    assert _steps(run) == [9, 8]
    assert (run / CHECKPOINT).read_bytes() == straight
    assert sorted(path.name for path in run.rglob("*.pt")) == [PREVIOUS, CHECKPOINT]


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_bit_for_bit(
    damage: Callable[[Path], None], run: Path, packed: ShardIndex, straight: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / CHECKPOINT)
    assert train_run(packed, run, run_config(*EACH_EPOCH, epochs=3)) == Outcome(first_step=6, step=9, num_steps=9)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{run / CHECKPOINT}: damaged" in warning
    assert warning.endswith("; resuming from checkpoint-previous.pt")
    assert (run / CHECKPOINT).read_bytes() == straight
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 3, 4, 6, 8, 9]


def test_the_previous_one_serves_where_the_latest_is_missing(run: Path, packed: ShardIndex, straight: bytes) -> None:
    (run / CHECKPOINT).unlink()  # a kill between two renames, where there are no links
    assert train_run(packed, run, run_config(*EACH_EPOCH, epochs=3)) == Outcome(first_step=6, step=9, num_steps=9)
    assert (run / CHECKPOINT).read_bytes() == straight


def test_two_damaged_ones_end_the_run_and_are_left_alone(run: Path, packed: ShardIndex) -> None:
    for name in (CHECKPOINT, PREVIOUS):
        _flip(run / name)
    before = {path.name: path.read_bytes() for path in run.glob("*.pt")}
    with pytest.raises(DataError, match=r"checkpoint-previous\.pt: damaged .* remove it and train again"):
        train_run(packed, run, run_config(*EACH_EPOCH, epochs=3))
    assert {path.name: path.read_bytes() for path in run.glob("*.pt")} == before
    assert train_run(packed, run, run_config(*EACH_EPOCH, epochs=3), restart=True).first_step == 0


def test_an_error_while_saving_leaves_both(run: Path, packed: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr(loop, "write_checkpoint", full)
    with pytest.raises(DataError, match="the disk is full"):
        train_run(packed, run, run_config(*EACH_EPOCH, epochs=3))
    assert _steps(run) == [8, 6]


def test_without_links_two_are_kept_as_well(packed: ShardIndex, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    train_run(packed, tmp_path, run_config(*EACH_EPOCH, epochs=3))
    assert _steps(tmp_path) == [9, 6]
    assert (tmp_path / CHECKPOINT).read_bytes() == straight


def test_kills_at_any_moment_leave_a_checkpoint_and_the_run_ends_as_ever(packed: ShardIndex, tmp_path: Path) -> None:
    """A save after every step; killed three times, each time a little after the next save has begun."""
    overrides, folder, rng = ["checkpoint_every_min=1e-9", "log_every_steps=1"], tmp_path / "killed", random.Random(3)
    job = json.dumps([{"index": str(packed.path), "folder": str(folder), "overrides": overrides, "epochs": 300}])
    step = 0
    for _ in range(3):
        before = (folder / CHECKPOINT).stat().st_mtime_ns if step else None
        with start_rank([_PROGRAM, job]) as process:
            while process.poll() is None and (not (folder / CHECKPOINT).exists() or (folder / CHECKPOINT).stat().st_mtime_ns == before):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        found = earlier_run(folder)
        assert found is not None
        assert found["step"] > step
        step = found["step"]
        assert all(read_checkpoint(path)["step"] <= step for path in folder.glob("*.pt") if not path.name.startswith("."))
    config = run_config(*overrides, epochs=300)
    assert train_run(packed, folder, config, max_steps=step + 2).first_step == step
    train_run(packed, tmp_path / "straight", config, max_steps=step + 2)
    assert (folder / CHECKPOINT).read_bytes() == (tmp_path / "straight" / CHECKPOINT).read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def _changed(path: Path, **changes: object) -> None:
    """The same checkpoint with another header."""
    values = dict(read_checkpoint(path))
    model, optimizer = values.pop("model"), values.pop("optimizer")
    write_checkpoint(path, values | changes, model=model, optimizer=optimizer)


def test_another_runs_checkpoint_is_refused(run: Path, photo_paths: list[Path], tmp_path: Path) -> None:
    other = pack(photo_paths[20:32], tmp_path / "other")
    with pytest.raises(StaleError, match=r"trained on shards .*, these are .*; start from scratch with --restart, or use another folder"):
        train_run(other, run, run_config(*EACH_EPOCH, epochs=3))
    assert _steps(run) == [8, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mined": {"pairs": "p0"}}, "trained with pairs p0, now None"),
        ({"renderer": "gpu"}, "rendered by gpu, cpu is asked for"),
        ({"config": {"train": {"no_such_key": 1}}}, "configuration is of another version of orl-fast"),
        ({"method": "orl"}, "holds a orl run, this is byol"),
    ],
)
def test_a_header_that_differs_is_refused(change: dict[str, Any], message: str, run: Path, packed: ShardIndex) -> None:
    _changed(run / CHECKPOINT, **change)
    with pytest.raises(StaleError, match=message):
        train_run(packed, run, run_config(*EACH_EPOCH, "renderer=cpu", epochs=3))


def test_another_version_of_torch_is_a_warning(run: Path, packed: ShardIndex, caplog: pytest.LogCaptureFixture) -> None:
    _changed(run / CHECKPOINT, versions={**read_header(run / CHECKPOINT)["versions"], "torch": "1.0"})
    assert train_run(packed, run, run_config(*EACH_EPOCH, epochs=3)).step == 9
    assert "written by torch 1.0, this is" in caplog.text


def test_weights_that_do_not_fit_are_explained(run: Path, packed: ShardIndex) -> None:
    values = dict(read_checkpoint(run / CHECKPOINT))
    model = {key: value for key, value in values.pop("model").items() if "projector" not in key}
    write_checkpoint(run / CHECKPOINT, values, model=model, optimizer=values.pop("optimizer"))
    with pytest.raises(DataError, match=r"does not fit the model .*train again with --restart"):
        train_run(packed, run, run_config(*EACH_EPOCH, epochs=3))


def test_a_disk_without_room_for_three_is_refused_at_the_start(packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(DataError, match=r"three checkpoints \(two kept, one being written\) takes .* MB, 1.0 MB are free"):
        train_run(packed, tmp_path / "new", run_config())
    assert not (tmp_path / "new").exists()
