"""Two gloo ranks, as real processes, against one process with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_views import run_steps, small_config
from torch import nn

from orl_fast.config import load_config
from orl_fast.errors import ConfigError
from orl_fast.train.distributed import Ranks, process_group
from orl_fast.train.step import micro_batch


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_ranks(world_size: int, method: str, overrides: list[str], *, num_steps: int, save_to: Path) -> list[dict[str, Any]]:
    arguments = json.dumps({"method": method, "overrides": overrides, "num_steps": num_steps})
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "SAVE_TO": str(save_to)}
    script = Path(__file__).with_name("synthetic_views.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(save_to / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    overrides = ["backbone=resnet18", "batch_size=8", "accumulate=2"]
    ranks = _run_ranks(2, "orl", overrides, num_steps=2, save_to=tmp_path)
    run_steps("orl", small_config(*overrides), num_steps=2, save_to=tmp_path)
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, value in alone["state"].items():
            torch.testing.assert_close(rank["state"][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]) for name in ranks[0]["state"])


def test_cpu_batch_norm_is_torchs_where_one_rank_holds_all(tmp_path: Path) -> None:
    from orl_fast.train.distributed import CpuSyncBatchNorm

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


def test_batches_that_cannot_be_shared_are_refused() -> None:
    two = Ranks(world_size=2)
    assert micro_batch(load_config(overrides=["batch_size=24", "accumulate=3"]), two) == 4
    with pytest.raises(ConfigError, match="multiple of 6"):
        micro_batch(load_config(overrides=["batch_size=27", "accumulate=3"]), two)
    with pytest.raises(ConfigError, match="two images"):
        micro_batch(load_config(overrides=["batch_size=6", "accumulate=3"]), two)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--device cpu"), process_group("cuda"):
        pass
