"""Whole runs on photographs: what is written, and that a stopped run ends with the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_views import small_config

from orl_fast.config import Config, load_config
from orl_fast.errors import ConfigError, DataError, MissingStageError, StaleError
from orl_fast.models import load_encoder, read_checkpoint
from orl_fast.shards import ShardIndex
from orl_fast.train import Outcome, Ranks, train
from orl_fast.train.stage import next_method, open_mined
from orl_fast.train.step import TrainStep

# 12 images: 3 steps per epoch.
RUN = ["batch_size=4", "image_size_px=32", "patch_size_px=32", "warmup_epochs=1", "log_every_steps=2"]


def _config(*overrides: str, epochs: int = 4) -> Config:
    return small_config(*RUN, "mining.num_neighbors=3", f"epochs={epochs}", *overrides)


def _train(
    index: ShardIndex, folder: Path, config: Config, *, mined: Path | None = None, restart: bool = False, max_steps: int | None = None
) -> Outcome:
    tables, method = open_mined(index, mined, config) if mined else None, "orl" if mined else "byol"
    return train(method, config, index=index, folder=folder, mined=tables, ranks=Ranks(), restart=restart, max_steps=max_steps)


class _StopAt:
    """Sends this process a signal in the middle of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
        inner = TrainStep.__call__

        def call(self: TrainStep, *arguments: Any, **options: Any) -> None:
            inner(self, *arguments, **options)
            if options["step"] == step:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(TrainStep, "__call__", call)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(
    packed: ShardIndex, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(epochs=3)
    assert _train(packed, tmp_path / "straight", config, mined=mined) == Outcome(first_step=0, step=9, num_steps=9)
    with monkeypatch.context() as patch:
        _StopAt(patch, 3, signal.SIGTERM)
        assert _train(packed, tmp_path / "stopped", config, mined=mined) == Outcome(
            first_step=0, step=4, num_steps=9, signum=signal.SIGTERM
        )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert _train(packed, tmp_path / "stopped", config, mined=mined) == Outcome(first_step=4, step=9, num_steps=9)
    straight, resumed = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("straight", "stopped"))
    assert _same(straight, resumed)
    assert straight["step"] == 9
    assert (tmp_path / "straight" / "checkpoint.pt").read_bytes() == (tmp_path / "stopped" / "checkpoint.pt").read_bytes()
    assert _train(packed, tmp_path / "stopped", config, mined=mined) == Outcome(first_step=9, step=9, num_steps=9)


def test_a_run_of_so_many_steps_is_the_first_part_of_the_whole(packed: ShardIndex, tmp_path: Path) -> None:
    config = _config(epochs=3)
    _train(packed, tmp_path / "straight", config)
    assert _train(packed, tmp_path / "parts", config, max_steps=5) == Outcome(first_step=0, step=5, num_steps=9)
    assert _train(packed, tmp_path / "parts", config, max_steps=5) == Outcome(first_step=5, step=5, num_steps=9)
    assert _train(packed, tmp_path / "parts", config) == Outcome(first_step=5, step=9, num_steps=9)
    assert (tmp_path / "straight" / "checkpoint.pt").read_bytes() == (tmp_path / "parts" / "checkpoint.pt").read_bytes()


def test_a_killed_run_goes_on_bit_for_bit_and_logs_no_step_twice(packed: ShardIndex, tmp_path: Path) -> None:
    overrides = ["checkpoint_every_epochs=1", "log_every_steps=1"]
    script = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from synthetic_views import small_config\n"
        "from orl_fast.shards import ShardIndex; from orl_fast.train import Ranks, train\n"
        "config = small_config(*sys.argv[4:])\n"
        "train('byol', config, index=ShardIndex.open(Path(sys.argv[2])), folder=Path(sys.argv[3]), ranks=Ranks())\n"
    )
    killed, arguments = tmp_path / "killed", [*RUN, "mining.num_neighbors=3", "epochs=6", *overrides]
    with subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(packed.path), str(killed), *arguments]) as process:
        while process.poll() is None and not (killed / "checkpoint.pt").exists():
            time.sleep(0.01)
        process.kill()
    before = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    first_step = read_checkpoint(killed / "checkpoint.pt")["step"]
    assert first_step % 3 == 0
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "loss": 1.0}\n{"step": 18, "lo')  # what a run further on, and a power failure, leave
    outcome = _train(packed, killed, _config(*overrides, epochs=6))
    assert outcome.first_step == first_step
    _train(packed, tmp_path / "straight", _config(*overrides, epochs=6))
    assert before == list(range(1, len(before) + 1))
    assert [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()] == list(range(1, 19))
    assert (killed / "checkpoint.pt").read_bytes() == (tmp_path / "straight" / "checkpoint.pt").read_bytes()


def test_a_run_folder_holds_what_was_done(packed: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "orl_fast")
    config = _config("keep_every_epochs=1", epochs=2)
    _train(packed, tmp_path, config)
    assert load_config(tmp_path / "recipe.toml") == config
    assert {path.name for path in tmp_path.glob("*.pt")} == {"checkpoint.pt", "epoch-0001.pt", "epoch-0002.pt"}
    assert load_encoder(tmp_path).config == config
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert [record["epoch"] for record in records] == pytest.approx([2 / 3, 1, 4 / 3, 2])
    # lr_per_256 = 0.2, 4 images; step 0 to 2 warm up, the cosine falls per epoch.
    assert [record["lr"] for record in records] == pytest.approx([0.2 / 64 * f for f in (1 / 3, 2 / 3, 0.5, 0.5)], rel=1e-3)
    assert all(0 < record["loss"] < 8 and record["images_per_s"] > 0 and 0 <= record["data_wait"] <= 1 for record in records)
    assert list((tmp_path / "tensorboard").iterdir())
    assert "byol: shufflenet_v2_x0_5, 12 images, 2 epochs = 6 steps of 4 images" in (tmp_path / "train.log").read_text()


def test_another_run_in_the_folder_is_refused_unless_restarted(packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    _train(packed, tmp_path, _config(epochs=1))
    with pytest.raises(StaleError, match=r"optim\.lr_per_256 = 0\.2 there, 0\.3 here\); start anew with --restart"):
        _train(packed, tmp_path, _config("lr_per_256=0.3", epochs=1))
    with pytest.raises(StaleError, match="holds a byol run, this is orl"):
        _train(packed, tmp_path, _config(epochs=1), mined=mined)
    unchanged = _config("log_every_steps=7", "num_threads=1", "mining.max_rois=7", epochs=1)
    assert _train(packed, tmp_path, unchanged).first_step == 3
    assert _train(packed, tmp_path, _config("lr_per_256=0.3", epochs=1), restart=True).first_step == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config("checkpoint_every_epochs=1")
    with monkeypatch.context() as patch:
        inner = TrainStep.__call__

        def call(self: TrainStep, *arguments: Any, **options: Any) -> None:
            if options["step"] == 4:
                with torch.no_grad():
                    next(self.method.online.parameters()).fill_(torch.nan)
            inner(self, *arguments, **options)

        patch.setattr(TrainStep, "__call__", call)
        with pytest.raises(DataError, match="no longer finite"):
            _train(packed, tmp_path, config)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert _train(packed, tmp_path, config).first_step == 3


def test_bad_starts_are_explained_and_leave_nothing(packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="the data holds only 12 images"):
        _train(packed, folder, _config("batch_size=16"))
    with pytest.raises(MissingStageError, match="run orl-fast mine"):
        open_mined(packed, tmp_path, _config())
    with pytest.raises(StaleError, match="num_neighbors"):
        open_mined(packed, mined, _config("mining.num_neighbors=5"))
    assert open_mined(packed, mined, _config("mining.num_neighbors=2")).pairs.neighbors.shape == (12, 2)
    assert not folder.exists()


def test_the_next_stage_follows_from_what_is_mined(packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    from tests.train.conftest import write_tables

    assert next_method(packed, tmp_path)[0] == "byol"
    assert next_method(packed, mined)[0] == "orl"
    write_tables(tmp_path, index="other shards", heights=packed.heights, widths=packed.widths)
    with pytest.raises(StaleError, match="made from index other shards"):
        next_method(packed, tmp_path)
