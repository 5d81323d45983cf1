"""Two gloo ranks, as real processes, against one process with the same global batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orl_fast.checkpoint import read_checkpoint, read_header
from orl_fast.distributed import Ranks, process_group
from orl_fast.errors import ConfigError
from orl_fast.methods import METHODS
from orl_fast.models.sync_bn import CpuSyncBatchNorm
from orl_fast.shards import ShardIndex
from orl_fast.train.metrics import Meter
from orl_fast.train.step import TrainStep
from tests.ranks import run_ranks
from tests.synthetic import part_of, small_config, synthetic_batch
from tests.train.conftest import train_run

OVERRIDES = ["backbone=resnet18", "batch_size=8", "accumulate=2"]


def run_steps(method: str, overrides: list[str], *, num_steps: int, save_to: Path) -> None:
    """Train a few steps in this process's rank, saving what came out; micro-batch m of rank r takes part m * world_size + r."""
    config = small_config(*overrides)
    with process_group("cpu") as ranks:
        train_step = TrainStep(method, config, ranks=ranks)
        # In float64, so that ranks differ from one process by their arithmetic's order only, and not by what training makes of it.
        train_step.method.double()
        for network in (train_step.method.online, train_step.method.target):
            network.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
        train_step.connect()
        meter = Meter(ranks)
        size = config.train.batch_size // (ranks.world_size * config.train.accumulate)
        for step in range(num_steps):
            batch = synthetic_batch(method, config, config.train.batch_size, step=step)
            parts = [micro * ranks.world_size + ranks.rank for micro in range(config.train.accumulate)]
            batches = iter([part_of(batch, part * size, (part + 1) * size) for part in parts])
            train_step(batches, step=step, num_steps=4, lr=0.05, meter=meter)
        record = meter.read()
        torch.save({"state": train_step.method.state_dict(), "loss": record["loss"]}, save_to / f"rank{ranks.rank}.pt")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"byol"}))
def test_two_ranks_learn_what_one_process_learns(method: str, tmp_path: Path) -> None:
    program = (
        f"import torch; torch.set_num_threads(1); from pathlib import Path; from tests.train.test_two_ranks import OVERRIDES, run_steps\n"
        f"run_steps({method!r}, OVERRIDES, num_steps=2, save_to=Path({str(tmp_path)!r}))"
    )
    for code, output in run_ranks(*[["-c", program]] * 2):
        assert code == 0, output
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    run_steps(method, OVERRIDES, num_steps=2, save_to=tmp_path)
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, value in alone["state"].items():
            torch.testing.assert_close(rank["state"][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]) for name in ranks[0]["state"])


def _jobs(*each: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What each rank's trainings, one after the other, printed."""
    program = Path(__file__).with_name("one_rank.py")
    results = run_ranks(*[[program, json.dumps(jobs)] for jobs in each])
    found = []
    for code, output in results:
        assert code == 0, output
        found.append([json.loads(line) for line in output.splitlines() if line.startswith("{")])
    return found


def test_two_ranks_train_and_resume_a_whole_run(packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    job = {"index": str(packed.path), "mined": str(mined)}
    parts = [{**job, "folder": str(tmp_path / "parts"), "max_steps": 2}, {**job, "folder": str(tmp_path / "parts")}]
    found = _jobs(*[[{**job, "folder": str(tmp_path / "straight")}, *parts]] * 2)
    assert found[0] == found[1]
    assert [(outcome["first_step"], outcome["step"]) for outcome in found[0]] == [(0, 6), (0, 2), (2, 6)]
    straight, resumed = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts"))
    assert all(torch.equal(value, resumed["model"][name]) for name, value in straight["model"].items())


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"folder": "a", "max_steps": 2}, {"folder": "b", "max_steps": 2}, "the step to start from: 2 on rank 0, 0 on rank 1"),
        ({"overrides": ["lr_per_256=0.3"]}, {}, "the recipe: "),
        ({"other_weights": True}, {}, "the weights to start from: "),
    ],
)
def test_ranks_that_start_differently_are_refused(
    first: dict[str, Any], second: dict[str, Any], what: str, packed: ShardIndex, tmp_path: Path
) -> None:
    """Run folders on local disks of two nodes, one of which holds an earlier part; other recipes; other weights."""
    from tests.train.conftest import run_config

    if "max_steps" in first:
        train_run(packed, tmp_path / "a", run_config(epochs=2), max_steps=2)
    base = {"index": str(packed.path)}
    jobs = [{**base, **job, "folder": str(tmp_path / str(job.get("folder", "a"))), "max_steps": 4} for job in (first, second)]
    found = _jobs(*[[job] for job in jobs])
    assert all(what in rank[0]["error"] and rank[0]["error"].startswith("ConfigError") for rank in found), found
    assert not (tmp_path / "b" / "checkpoint.pt").exists()
    if "max_steps" in first:
        assert read_header(tmp_path / "a" / "checkpoint.pt")["step"] == 2


def test_cpu_batch_norm_is_torchs_where_one_rank_holds_all(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        for shape in ((6, 5), (6, 5, 3, 4)):
            torch.manual_seed(0)
            values = torch.randn(shape, dtype=torch.float32) * 3 + 100
            plain = nn.BatchNorm1d(5) if len(shape) == 2 else nn.BatchNorm2d(5)
            nn.init.normal_(plain.weight)
            synced = CpuSyncBatchNorm(5)
            synced.load_state_dict(plain.state_dict())
            upstream = torch.randn(shape)
            results = []
            for norm in (plain, synced):
                inputs = values.clone().requires_grad_()
                output = norm(inputs)
                output.backward(upstream)
                results.append([output, inputs.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(synced.eval()(values), plain.eval()(values), rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_batches_too_small_for_batch_norm_are_refused() -> None:
    with pytest.raises(ConfigError, match="two images in each of 2 ranks × 3 micro-batches; use 12 or more"):
        TrainStep("byol", small_config("batch_size=6", "accumulate=3"), ranks=Ranks(world_size=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--device cpu"), process_group("cuda"):
        pass
