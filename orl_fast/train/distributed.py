"""Ranks, devices and the environment of torchrun: read here and nowhere else. Also what must agree between ranks."""

import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from orl_fast.errors import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of how many processes this one is, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_threads(self) -> int:
        """The cores of this process, shared among its node's ranks."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return max(1, cores // self.local_world_size)


@contextmanager
def process_group(choice: DeviceChoice = "auto") -> Iterator[Ranks]:
    """Join the group that torchrun started (NCCL on GPUs, gloo on CPUs); alone, without torchrun.

    Raises:
        ConfigError: "cuda" on a machine without a usable GPU, or with fewer GPUs than ranks.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    device = _device(choice, local_rank)
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield ranks
        return
    # gloo beside NCCL: small agreements between hosts, which must not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), device_id=device if device.type == "cuda" else None)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _device(choice: DeviceChoice, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no usable GPU here; use --device cpu, or check the driver with nvidia-smi")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this node finds {torch.cuda.device_count()} GPUs; start torchrun with --nproc-per-node of at most that"
        )
    return torch.device("cuda", local_rank)


def synchronize_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Take batch statistics over all ranks from now on; parameters, buffers and their names stay. Nothing to do for one rank."""
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    elif ranks.world_size > 1:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over all ranks for gloo, where torch's own wants a GPU. Ranks may hold different numbers of samples."""

    def _check_input_dim(self, input: Tensor) -> None:
        del input  # any number of dimensions: [B, C] and [B, C, h, w]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [0, *range(2, values.ndim)]
        shape = [1, -1, *[1] * (values.ndim - 2)]
        num_values = values.new_tensor([values.numel() / values.shape[1]])
        sums: Tensor = _AllReduceSum.apply(torch.cat([values.sum(axes), num_values]))
        num_values = sums[-1].detach()
        mean = sums[:-1] / num_values
        centered = values - mean.view(shape)
        # A second round for the squares about the mean: E[x²] - E[x]² would cancel.
        variance: Tensor = _AllReduceSum.apply(centered.square().sum(axes)) / num_values
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * num_values / (num_values - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


class _AllReduceSum(Function):
    """Sum over ranks; the gradient of a sum that every rank uses is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def mean_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """The mean of a small tensor over ranks; in place."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
        values /= ranks.world_size
    return values


class Agreement:
    """Whether any rank wants to stop, known to all at the same step, without waiting for the GPU.

    Ranks receive a signal at different steps, and one that stops alone leaves the others waiting for it for ever. So the question asked
    in one step, in the background, is answered in the next.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._alone = ranks.world_size == 1
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None

    def any(self, wish: bool) -> bool:
        """Called by every rank in every step; True one step after some rank's wish."""
        if self._alone:
            return wish
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._flag.item())
        self._flag.fill_(float(wish))
        self._work = dist.all_reduce(self._flag, async_op=True)
        return agreed
