"""Metrics of a run: summed on the device, read at log steps only, written as JSON lines and for TensorBoard."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orl_fast.distributed import Ranks, mean_over_ranks
from orl_fast.errors import DataError
from orl_fast.files import atomic_file


class Meter:
    """Losses, speed and waiting since the last log step."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.clock = WaitClock(ranks.device)
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self._sums: dict[str, Tensor] = {}
        self._num_losses = self._num_images = self._num_skipped = 0
        self.clock.reset()
        self._start_s = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], *, num_images: int, num_skipped: int) -> None:
        """Count one micro-batch of this rank; nothing waits for the device."""
        for name, value in losses.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_losses += 1
        self._num_images += num_images
        self._num_skipped += num_skipped

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last call; waits for the device.

        Raises:
            DataError: the loss is not finite.
        """
        counts = torch.tensor([self._num_images, self._num_skipped], dtype=torch.float64)
        losses = mean_over_ranks(torch.stack(list(self._sums.values())) / self._num_losses, self._ranks).tolist()
        elapsed_s = time.perf_counter() - self._start_s
        num_images, num_skipped = (mean_over_ranks(counts, self._ranks) * self._ranks.world_size).tolist()
        record = dict(zip(self._sums, losses, strict=True))
        record |= {"images_per_s": num_images / elapsed_s, "data_wait": self.clock.waited_s() / elapsed_s, "skipped": num_skipped}
        record["time"] = round(time.time(), 3)
        self.restart()
        if not all(math.isfinite(value) for value in losses):
            terms = ", ".join(f"{name} {value}" for name, value in zip(record, losses, strict=False))
            raise DataError(
                f"the loss is no longer finite ({terms}), so training stops; the last checkpoint is kept. "
                "Try a lower optim.lr_per_256, a longer optim.warmup_epochs, or train.precision=fp32, with --restart"
            )
        return record


class WaitClock:
    """Time the device was idle waiting for data.

    The CPU waits while the loader is asked. A GPU works on while the host asks: its wait is the gap in its own stream between the end of
    one batch's work and the arrival of the next, taken between two events that are read at log steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self._waited_s = 0.0
        self._finished: torch.cuda.Event | None = None
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def host_waited(self, seconds: float) -> None:
        """The loader kept the host for so long."""
        if not self._gpu:
            self._waited_s += seconds

    def arrived(self) -> None:
        """The current stream waits for nothing but its next batch, which has been uploaded at this point of it."""
        if self._finished is not None:
            self._gaps.append((self._finished, _timed_event()))

    def computed(self) -> None:
        """A batch's work has been handed to the device."""
        if self._gpu:
            self._finished = _timed_event()

    def waited_s(self) -> float:
        """Since the last reset; the device must have finished."""
        return self._waited_s + sum(float(end.elapsed_time(start)) for end, start in self._gaps) / 1000


def _timed_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class MetricsLog:
    """metrics.jsonl and TensorBoard events in a run folder, from `step` on: records of a killed run beyond it are dropped."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_file(path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def write(self, record: Mapping[str, Any]) -> None:
        """One record with its "step"."""
        self._file.write(json.dumps(dict(record)) + "\n")
        for name, value in record.items():
            if name not in ("step", "time"):
                self._board.add_scalar(name, value, record["step"])  # type: ignore[no-untyped-call]
        self._board.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._file.close()
        self._board.close()  # type: ignore[no-untyped-call]


def _step_of(line: str) -> float:
    """The record's step; a line cut by a power failure counts as beyond all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
