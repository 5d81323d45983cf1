"""Ranks, devices and the environment of torchrun: read here and nowhere else. Also what must agree between ranks."""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from orl_fast.cores import num_cores
from orl_fast.errors import ConfigError, OrlFastError

DeviceChoice = Literal["auto", "cpu", "cuda"]
Result = TypeVar("Result")


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
        return max(1, num_cores() // self.local_world_size)


@contextmanager
def process_group(choice: DeviceChoice = "auto") -> Iterator[Ranks]:
    """Join the group that torchrun started (NCCL on GPUs, gloo on CPUs); alone, without torchrun.

    ConfigError for "cuda" on a machine without a usable GPU, or with fewer GPUs than ranks.
    """
    names = ("rank", "world_size", "local_rank", "local_world_size")
    given = {name: int(os.environ[name.upper()]) for name in names if name.upper() in os.environ}
    device = _device(choice, given.get("local_rank", 0))
    ranks = Ranks(**given, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield ranks
        return
    # gloo besides NCCL: small exchanges between hosts, which must not wait for the GPU.
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


class _AllReduceSum(Function):
    """torch.distributed.nn has the same, deprecated."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _AllReduceSum.forward(ctx, gradient)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, with its gradient: that of a sum which every rank uses is the sum of the ranks' gradients."""
    return _AllReduceSum.apply(tensor)  # type: ignore[no-any-return]


def gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in their order: [B, …] → [world_size * B, …], for example for negatives over the global batch.

    Ranks must hold equally many rows, which receive the sum of all ranks' gradients for them. Without a process group, the tensor itself.
    """
    if not dist.is_initialized():
        return tensor
    rows = tensor.new_zeros(dist.get_world_size(), *tensor.shape)
    rows[dist.get_rank()] = tensor
    return sum_over_ranks(rows).flatten(0, 1)


def broadcast_value(value: Any, ranks: Ranks) -> Any:
    """The first rank's value, on every rank; any plain value."""
    if ranks.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def decided(function: Callable[[], Result], ranks: Ranks) -> Result:
    """function() as the first rank computes it, on every rank: its result, any plain value, or the OrlFastError that it raised.

    The others wait for days if need be, as for packing a large data set.
    """
    if ranks.world_size == 1:
        return function()
    group = patient_group()
    try:
        return decided_in(group, function, is_main=ranks.is_main)
    finally:
        dist.destroy_process_group(group)


def patient_group() -> Any:
    """All ranks, for exchanges between which they wait for days if need be."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def decided_in(group: Any, function: Callable[[], Result], *, is_main: bool) -> Result:
    """As `decided`, in a group that is kept."""
    outcome: list[Any] = [None, None]
    if is_main:
        try:
            outcome[0] = function()
        except OrlFastError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def gather_values(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value on the first rank, in their order, and nothing on the others; any plain values."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.gather_object(value, values if ranks.is_main else None)
    return values if ranks.is_main else []


def require_same(values: Mapping[str, Any], ranks: Ranks) -> None:
    """ConfigError where ranks differ, with the first name that does: other shards, tables, recipes or checkpoints on some node."""
    if ranks.world_size == 1:
        return
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, dict(values))
    for name in values:
        other = next((rank for rank, theirs in enumerate(everyone) if theirs[name] != everyone[0][name]), None)
        if other is not None:
            raise ConfigError(
                f"{name}: {everyone[0][name]} on rank 0, {everyone[other][name]} on rank {other}; give all nodes the same shards, "
                "mined tables, recipe and run folder (one that all of them share, or equal copies)"
            )


def mean_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """The mean of a small tensor over ranks; in place."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
        values /= ranks.world_size
    return values


class Agreement:
    """What any rank requests (to stop, to save), known to all at the same step, without waiting for the GPU.

    Ranks receive a signal at different steps, and one that stops alone leaves the others waiting for it forever. So a request of one step
    is sent in the background and is known in the next.
    """

    def __init__(self, ranks: Ranks, num_requests: int) -> None:
        self._alone = ranks.world_size == 1
        self._flags = torch.zeros(num_requests)
        self._work: dist.Work | None = None

    def any(self, *requests: bool) -> list[bool]:
        """Called by every rank in every step; each entry is True one step after some rank's request."""
        if self._alone:
            return list(requests)
        agreed = [False] * len(requests)
        if self._work is not None:
            self._work.wait()
            agreed = [flag > 0 for flag in self._flags.tolist()]
        self._flags.copy_(torch.tensor([float(request) for request in requests]))
        self._work = dist.all_reduce(self._flags, async_op=True)
        return agreed
