"""Whole runs on photographs: what is written, and that a stopped run ends with the bits of one that was not."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orl_fast.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint, read_header
from orl_fast.config import LoaderConfig
from orl_fast.distributed import Ranks
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.models import load_encoder
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex
from orl_fast.train import loop
from orl_fast.train.loop import Outcome
from orl_fast.train.step import TrainStep
from orl_fast.views.loader import ViewLoader
from tests.ranks import start_rank
from tests.test_checkpoint import equal
from tests.train.conftest import EACH_EPOCH, after_step, run_config, train_run

_PROGRAM = Path(__file__).with_name("one_rank.py")


def _stop(_: TrainStep) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_stopped_in_mid_epoch_is_resumed_bit_for_bit(packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    config = run_config(epochs=3)
    assert train_run(packed, tmp_path / "straight", config, mined=mined) == Outcome(first_step=0, step=9, num_steps=9)
    with after_step(3, _stop):
        outcome = train_run(packed, tmp_path / "stopped", config, mined=mined)
    assert outcome == Outcome(first_step=0, step=4, num_steps=9, signum=signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train_run(packed, tmp_path / "stopped", config, mined=mined) == Outcome(first_step=4, step=9, num_steps=9)
    straight, resumed = (read_checkpoint(tmp_path / name / CHECKPOINT) for name in ("straight", "stopped"))
    assert equal(straight, resumed)
    assert straight["step"] == straight["num_steps"] == 9
    assert (tmp_path / "straight" / CHECKPOINT).read_bytes() == (tmp_path / "stopped" / CHECKPOINT).read_bytes()
    assert train_run(packed, tmp_path / "stopped", config, mined=mined) == Outcome(first_step=9, step=9, num_steps=9)


def test_a_run_of_so_many_steps_is_the_first_part_of_the_whole(packed: ShardIndex, straight: bytes, tmp_path: Path) -> None:
    config = run_config(*EACH_EPOCH, epochs=3)
    assert train_run(packed, tmp_path, config, max_steps=5) == Outcome(first_step=0, step=5, num_steps=9)
    assert train_run(packed, tmp_path, config, max_steps=5) == Outcome(first_step=5, step=5, num_steps=9)
    assert train_run(packed, tmp_path, config) == Outcome(first_step=5, step=9, num_steps=9)
    assert (tmp_path / CHECKPOINT).read_bytes() == straight


def test_a_killed_run_is_resumed_bit_for_bit_and_logs_no_step_twice(packed: ShardIndex, straight: bytes, tmp_path: Path) -> None:
    overrides = [*EACH_EPOCH, "log_every_steps=1"]
    job = {"index": str(packed.path), "folder": str(tmp_path), "overrides": overrides, "epochs": 3}
    with start_rank([_PROGRAM, json.dumps([job])]) as process:
        while process.poll() is None and not (tmp_path / CHECKPOINT).exists():
            time.sleep(0.005)
        process.kill()
    before = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first_step = read_header(tmp_path / CHECKPOINT)["step"]
    assert first_step % 3 == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # what a run further on, and a power failure, leave
    assert train_run(packed, tmp_path, run_config(*overrides, epochs=3)).first_step == first_step
    assert before == list(range(1, len(before) + 1))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(1, 10))
    _assert_same_but_for_the_recipe(tmp_path / CHECKPOINT, straight, tmp_path)


def _assert_same_but_for_the_recipe(path: Path, straight: bytes, folder: Path) -> None:
    (folder / "straight.pt").write_bytes(straight)
    found, expected = dict(read_checkpoint(path)), dict(read_checkpoint(folder / "straight.pt"))
    del found["config"], expected["config"]
    assert equal(found, expected)


def test_a_second_process_in_the_folder_is_refused_and_the_first_unharmed(packed: ShardIndex, straight: bytes, tmp_path: Path) -> None:
    config = run_config(*EACH_EPOCH, epochs=3)
    job = {"index": str(packed.path), "folder": str(tmp_path), "overrides": EACH_EPOCH, "epochs": 3}
    with start_rank([_PROGRAM, json.dumps([job])]) as process:
        while process.poll() is None and not (tmp_path / "recipe.toml").exists():
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGSTOP)  # it holds the folder, and cannot finish meanwhile
        try:
            for restart in (False, True):
                with pytest.raises(DataError, match=rf"{tmp_path}: orl-fast train \(process {process.pid} on .*\) is writing here"):
                    train_run(packed, tmp_path, config, restart=restart)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        output = process.communicate(timeout=60)[0]
    assert json.loads(output.splitlines()[-1]) == {"first_step": 0, "step": 9, "num_steps": 9, "signum": 0}
    assert (tmp_path / CHECKPOINT).read_bytes() == straight
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6  # of its steps 2, 3, 4, 6, 8, 9
    assert train_run(packed, tmp_path, config) == Outcome(first_step=9, step=9, num_steps=9)


def test_a_checkpoint_every_so_many_minutes_changes_no_bits(
    packed: ShardIndex, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    inner = loop.save_latest
    monkeypatch.setattr(loop, "save_latest", lambda folder, write: (saved.append(write.keywords["header"]["step"]), inner(folder, write)))
    train_run(packed, tmp_path / "always", run_config("checkpoint_every_min=1e-9", epochs=3))
    assert saved == list(range(1, 10))
    _assert_same_but_for_the_recipe(tmp_path / "always" / CHECKPOINT, straight, tmp_path)
    saved.clear()
    train_run(packed, tmp_path / "never", run_config("checkpoint_every_min=0", epochs=3))
    assert saved == [9]


def test_a_run_folder_holds_what_was_done(packed: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "orl_fast")
    config = run_config("keep_every_epochs=1", epochs=2)
    train_run(packed, tmp_path, config)
    assert load_config(tmp_path / "recipe.toml") == config
    assert {path.name for path in tmp_path.glob("*.pt")} == {"checkpoint.pt", "epoch-0001.pt", "epoch-0002.pt"}
    assert read_header(tmp_path / "epoch-0001.pt")["step"] == 3
    assert load_encoder(tmp_path).mining == config.mining
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert [record["epoch"] for record in records] == pytest.approx([2 / 3, 1, 4 / 3, 2])
    # lr_per_256 = 0.2, 4 images; step 0 to 2 warm up, the cosine falls per epoch.
    assert [record["lr"] for record in records] == pytest.approx([0.2 / 64 * f for f in (1 / 3, 2 / 3, 0.5, 0.5)], rel=1e-3)
    assert all(0 < record["loss"] < 8 and record["images_per_s"] > 0 and 0 <= record["data_wait"] <= 1 for record in records)
    assert all(0.99 <= record["ema_momentum"] < 1 and record["skipped"] == 0 for record in records)
    assert list((tmp_path / "tensorboard").iterdir())
    text = (tmp_path / "train.log").read_text()
    assert "byol: resnet10_small, 12 images, 2 epochs = 6 steps of 4 images" in text
    assert "views by the cpu renderer" in text


def test_another_run_in_the_folder_is_refused_unless_restarted(packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    train_run(packed, tmp_path, run_config(epochs=1))
    with pytest.raises(StaleError, match=r"optim\.lr_per_256 = 0\.2 then, 0\.3 now\); start from scratch with --restart"):
        train_run(packed, tmp_path, run_config("lr_per_256=0.3", epochs=1))
    with pytest.raises(StaleError, match="holds a byol run, this is orl"):
        train_run(packed, tmp_path, run_config(epochs=1), mined=mined)
    unchanged = ["log_every_steps=7", "num_threads=1", "prefetch=1", "mining.max_rois=7", "checkpoint_every_min=3", "use_patches=false"]
    assert train_run(packed, tmp_path, run_config(*unchanged, epochs=1)).first_step == 3
    (tmp_path / "notes.txt").write_text("not of the run")
    assert train_run(packed, tmp_path, run_config("lr_per_256=0.3", epochs=1), restart=True).first_step == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "notes.txt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(packed: ShardIndex, tmp_path: Path) -> None:
    with after_step(3, _spoil_weights), pytest.raises(DataError, match="no longer finite"):
        train_run(packed, tmp_path, run_config(*EACH_EPOCH))
    assert read_header(tmp_path / CHECKPOINT)["step"] == 3
    assert train_run(packed, tmp_path, run_config(*EACH_EPOCH)).first_step == 3


def _spoil_weights(step: TrainStep) -> None:
    with torch.no_grad():
        next(step.method.online.parameters())[-1, -1, -1, -1] = torch.nan


def _spoil_statistics(step: TrainStep) -> None:
    next(buffer for buffer in step.method.online.buffers() if buffer.is_floating_point())[0] = torch.inf


def _spoil_momentum(step: TrainStep) -> None:
    next(iter(step.optimizer.state.values()))["momentum_buffer"][-1, -1, -1, -1] = torch.inf


@pytest.mark.parametrize("spoil", [_spoil_weights, _spoil_statistics, _spoil_momentum])
def test_a_state_that_is_not_finite_is_never_saved(
    spoil: Callable[[TrainStep], None], packed: ShardIndex, straight: bytes, tmp_path: Path
) -> None:
    """Where the last step of an epoch spoils it, its loss was still finite."""
    config = run_config(*EACH_EPOCH, epochs=3)
    with after_step(8, spoil), pytest.raises(DataError, match=r"not finite after step 9, .*the last checkpoints are kept"):
        train_run(packed, tmp_path, config)
    assert [read_header(tmp_path / name)["step"] for name in (CHECKPOINT, PREVIOUS)] == [6, 3]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [PREVIOUS, CHECKPOINT]
    assert train_run(packed, tmp_path, config) == Outcome(first_step=6, step=9, num_steps=9)
    assert (tmp_path / CHECKPOINT).read_bytes() == straight


def test_the_renderer_is_recorded_and_kept(packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    inner = ViewLoader.open.__func__  # type: ignore[attr-defined]

    def open_loader(cls: type[ViewLoader], *arguments: Any, loader: LoaderConfig, **options: Any) -> ViewLoader:
        opened.append(loader.renderer)
        return inner(cls, *arguments, loader=loader, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(ViewLoader, "open", classmethod(open_loader))
    train_run(packed, tmp_path, run_config("renderer=reference", epochs=2), max_steps=1)
    assert read_header(tmp_path / CHECKPOINT)["renderer"] == "reference"
    train_run(packed, tmp_path, run_config(epochs=2), max_steps=2)  # auto
    assert read_header(tmp_path / CHECKPOINT)["renderer"] == "reference"
    assert opened == ["reference", "reference"]
    with pytest.raises(StaleError, match="rendered by reference, cpu is asked for; leave --renderer out, or start from scratch"):
        train_run(packed, tmp_path, run_config("renderer=cpu", epochs=2))
    train_run(packed, tmp_path, run_config(epochs=2), max_steps=1, restart=True)
    assert read_header(tmp_path / CHECKPOINT)["renderer"] == "cpu"


def test_auto_is_measured_on_a_gpu_when_a_run_begins_and_never_again(packed: ShardIndex, tmp_path: Path) -> None:
    measured: list[dict[str, Any]] = []

    class Trial:
        renderer_kind = "gpu"

        def __init__(self, **options: Any) -> None:
            measured.append(options)

        def __enter__(self) -> "Trial":
            return self

        def __exit__(self, *_: object) -> None:
            measured[-1]["closed"] = True

    gpu, auto = Ranks(device=torch.device("cuda")), LoaderConfig()
    assert loop._chosen_renderer(tmp_path, Trial, auto, gpu) == "gpu"  # type: ignore[arg-type]
    assert measured == [{"loader": auto, "num_steps": 0, "closed": True}]
    train_run(packed, tmp_path, run_config("renderer=reference"), max_steps=1)
    assert loop._chosen_renderer(tmp_path, Trial, auto, gpu) == "reference"  # type: ignore[arg-type]
    assert len(measured) == 1
    assert loop._chosen_renderer(None, Trial, auto, gpu) == "gpu"  # type: ignore[arg-type]  # --restart
    assert loop._chosen_renderer(None, Trial, auto, Ranks()) == "cpu"  # type: ignore[arg-type]


def test_views_of_a_gpu_are_not_resumed_without_one(packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "earlier_run", lambda _: {"renderer": "gpu"})
    with pytest.raises(
        StaleError, match="rendered on a GPU, and there is none here; resume it on a machine with a CUDA GPU, or start from"
    ):
        train_run(packed, tmp_path, run_config())


def test_orl_without_levels_of_rois_needs_no_pairs(packed: ShardIndex, straight: bytes, tmp_path: Path) -> None:
    config = run_config(*EACH_EPOCH, "intra_weight=0", "inter_weight=0", epochs=3)
    assert train_run(packed, tmp_path, config, method="orl").step == 9
    (tmp_path / "straight.pt").write_bytes(straight)
    orl, byol = read_checkpoint(tmp_path / CHECKPOINT)["model"], read_checkpoint(tmp_path / "straight.pt")["model"]
    assert all(torch.equal(value, byol[name.replace("predictors.image.", "predictor.")]) for name, value in orl.items())


def test_bad_starts_are_explained_and_leave_nothing(packed: ShardIndex, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with pytest.raises(ConfigError, match="the data holds only 12 images"):
        train_run(packed, folder, run_config("batch_size=16"))
    with pytest.raises(ConfigError, match=r"12 images; training needs 16 or more, two for each of 1 ranks × 8 micro-batches"):
        train_run(packed, folder, run_config("batch_size=16", "accumulate=8"))
    with pytest.raises(ConfigError, match="no CUDA device"):
        train_run(packed, folder, run_config("renderer=gpu"))
    assert not folder.parent.exists()
