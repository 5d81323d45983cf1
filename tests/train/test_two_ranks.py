"""Two gloo ranks, as real processes: against one process with the same global batch, and when they do not fit together."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orl_fast.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint, read_header
from orl_fast.distributed import process_group
from orl_fast.methods import METHODS
from orl_fast.shards import ShardIndex
from orl_fast.train.metrics import Meter
from orl_fast.train.step import TrainStep
from tests.conftest import pack
from tests.ranks import run_ranks
from tests.synthetic import part_of, small_config, synthetic_batch
from tests.test_checkpoint import equal
from tests.train.conftest import in_float64, run_config, train_run

_PROGRAM = Path(__file__).with_name("one_rank.py")


def run_steps(method: str, overrides: list[str], *, num_steps: int, save_to: Path) -> None:
    """Train a few steps in this process's rank, saving what came out; micro-batch m of rank r takes part m * world_size + r."""
    config = small_config(*overrides)
    with process_group("cpu") as ranks, in_float64():
        train_step = TrainStep(method, config, ranks=ranks)
        train_step.connect()
        meter = Meter(ranks)
        size = config.train.batch_size // (ranks.world_size * config.train.accumulate)
        for step in range(num_steps):
            batch = synthetic_batch(method, config, config.train.batch_size, step=step)
            parts = [micro * ranks.world_size + ranks.rank for micro in range(config.train.accumulate)]
            batches = iter([part_of(batch, part * size, (part + 1) * size) for part in parts])
            train_step(batches, step=step, num_steps=num_steps, lr=0.05, meter=meter)
        record = meter.read()
        torch.save({"state": train_step.method.state_dict(), "loss": record["loss"]}, save_to / f"rank{ranks.rank}.pt")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"byol"}))
def test_two_ranks_learn_what_one_process_learns(method: str, tmp_path: Path) -> None:
    arguments = {"method": method, "overrides": ["backbone=resnet10_small", "batch_size=8", "accumulate=2"], "num_steps": 2}
    command = [__file__, json.dumps(arguments), tmp_path]
    for code, output in run_ranks(command, command):
        assert code == 0, output
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    run_steps(**arguments, save_to=tmp_path)  # type: ignore[arg-type]
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, value in alone["state"].items():
            torch.testing.assert_close(rank["state"][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]) for name in ranks[0]["state"])


def _run(jobs: list[dict[str, Any]], *, of_rank_1: list[dict[str, Any]] | None = None) -> list[list[dict[str, Any]]]:
    """Trainings in two ranks, one after the other; what each rank reports of each."""
    results = []
    for code, output in run_ranks([_PROGRAM, json.dumps(jobs)], [_PROGRAM, json.dumps(of_rank_1 or jobs)]):
        assert code == 0, output
        results.append([json.loads(line) for line in output.splitlines() if line.startswith("{")])
        assert len(results[-1]) == len(jobs), output
    return results


def test_a_run_of_two_ranks_is_that_of_one_process_and_is_resumed(packed: ShardIndex, tmp_path: Path) -> None:
    overrides = ["batch_size=6", "lr_per_256=0.5", "warmup_epochs=0"]
    jobs: list[dict[str, Any]] = [
        {"folder": "straight"},
        {"folder": "stopped", "max_steps": 3},
        {"folder": "stopped"},
        {"folder": "often", "overrides": [*overrides, "checkpoint_every_min=1e-9"]},
        {"folder": "killed", "stop_at": 1, "only_rank": 1},
        {"folder": "killed"},
    ]
    common = {"index": str(packed.path), "overrides": overrides, "epochs": 3, "float64": True}
    found = _run([{**common, **job, "folder": str(tmp_path / job["folder"])} for job in jobs])
    whole = {"first_step": 0, "step": 6, "num_steps": 6, "signum": 0}
    # A signal that one rank receives in a step is known to both in the next.
    signaled = {**whole, "step": 3, "signum": signal.SIGTERM}
    expected = [whole, {**whole, "step": 3}, {**whole, "first_step": 3}, whole, signaled, {**whole, "first_step": 3}]
    assert found == [expected, expected]
    straight = (tmp_path / "straight" / CHECKPOINT).read_bytes()
    for folder in ("stopped", "killed"):
        assert (tmp_path / folder / CHECKPOINT).read_bytes() == straight, folder
    assert read_header(tmp_path / "often" / PREVIOUS)["step"] == 4  # and so has a checkpoint that is due
    often, two = (read_checkpoint(tmp_path / folder / CHECKPOINT) for folder in ("often", "straight"))
    assert all(equal(often[key], two[key]) for key in ("model", "optimizer", "step"))

    with in_float64():
        train_run(packed, tmp_path / "alone", run_config(*overrides, epochs=3))
    one, header = read_checkpoint(tmp_path / "alone" / CHECKPOINT), read_header(tmp_path / "alone" / CHECKPOINT)
    assert header == read_header(tmp_path / "straight" / CHECKPOINT)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_ranks_that_differ_refuse_to_start(packed: ShardIndex, mined: Path, photo_paths: list[Path], tmp_path: Path) -> None:
    """The review's 4.3: on local disks, each rank started from what it found there."""
    config = run_config(epochs=2)
    train_run(packed, tmp_path / "resumed", config, max_steps=3)
    other_mined = tmp_path / "other mined"
    shutil.copytree(mined, other_mined)
    info = other_mined / "pairs" / "table.json"
    info.write_text(info.read_text().replace('"e0"', '"e1"'))
    other = pack(photo_paths[20:32], tmp_path / "other")
    base: dict[str, Any] = {"index": str(packed.path), "folder": str(tmp_path / "new")}
    pairs: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"folder": str(tmp_path / "resumed")}, {"folder": str(tmp_path / "empty")}, "the step to start from: 3 on rank 0, 0 on rank 1"),
        ({"folder": str(tmp_path / "empty")}, {"folder": str(tmp_path / "resumed")}, "the step to start from: 0 on rank 0, 3 on rank 1"),
        ({}, {"overrides": ["lr_per_256=0.3"]}, "the recipe: "),
        ({}, {"index": str(other.path)}, "the shards: "),
        ({"mined": str(mined)}, {"mined": str(other_mined)}, "the mined tables: "),
        ({}, {"float64": True}, "the weights to start from: "),
    ]
    before = (tmp_path / "resumed" / CHECKPOINT).read_bytes()
    found = _run([base | first for first, _, _ in pairs], of_rank_1=[base | second for _, second, _ in pairs])
    for rank in found:
        for (_, _, message), reported in zip(pairs, rank, strict=True):
            assert reported["error"].startswith(f"ConfigError: {message}"), (message, reported)
            assert "give all nodes the same shards, mined tables, recipe and run folder" in reported["error"]
    assert (tmp_path / "resumed" / CHECKPOINT).read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "empty").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_steps(**json.loads(sys.argv[1]), save_to=Path(sys.argv[2]))
