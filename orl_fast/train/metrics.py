"""Metrics of a run: summed on the device, read at log steps only, written as JSON lines and for TensorBoard; and the wait for batches."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orl_fast.distributed import Ranks, mean_over_ranks
from orl_fast.errors import DataError
from orl_fast.files import atomic_file
from orl_fast.views.plan import Batch


class Meter:
    """Losses, speed and waiting since the last log step."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self._sums: dict[str, Tensor] = {}
        self._num_losses = self._num_images = self._num_skipped = 0
        self._host_waited_s = 0.0
        self._stages: Counter[str] = Counter()  # seconds of waiting by what the loader was busy with
        self._finished: torch.cuda.Event | None = None
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start_s = time.perf_counter()

    def feed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches whose tensors are, or will be before the current stream needs them, on the device; count how long it waits.

        The CPU waits while the loader is asked. While a GPU works on one batch the host has already asked for the next, and a stream of its
        own copies it (pinned memory, uint8): the GPU's wait is the gap in its stream between the end of one batch's work and the arrival of
        the next, taken between two events that are read at log steps.
        """
        device = self._ranks.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        iterator = iter(batches)
        in_use: tuple[Batch, torch.cuda.Event] | None = None
        while True:
            start_s = time.perf_counter()
            batch = next(iterator, None)
            waited_s = time.perf_counter() - start_s
            if stream is None:
                self._host_waited_s += waited_s
            if batch is None:
                return
            total_s = sum(batch.seconds.values()) or 1
            self._stages.update({stage: waited_s * seconds / total_s for stage, seconds in batch.seconds.items()})  # type: ignore[arg-type]
            if stream is None:
                yield batch
                continue
            batch = _uploaded(batch, device, stream)
            if self._finished is not None:  # the stream waits for nothing but its next batch, which has been uploaded at this point of it
                self._gaps.append((self._finished, _timed_event()))
            yield batch
            self._finished = _timed_event()
            # The GPU renderer's views are DALI's memory, which torch's allocator does not know: they are held until their work is done.
            if in_use is not None:
                in_use[1].synchronize()
            in_use = batch, self._finished

    def add(self, losses: Mapping[str, Tensor], *, num_images: int, num_skipped: int) -> None:
        """Count one micro-batch of this rank; nothing waits for the device."""
        for name, value in losses.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_losses += 1
        self._num_images += num_images
        self._num_skipped += num_skipped

    def waited_s(self) -> float:
        """How long the device was idle waiting for data; it must have finished."""
        return self._host_waited_s + sum(float(end.elapsed_time(start)) for end, start in self._gaps) / 1000

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last call; waits for the device. DataError if the loss is not finite."""
        counts = torch.tensor([self._num_images, self._num_skipped], dtype=torch.float64)
        losses = mean_over_ranks(torch.stack(list(self._sums.values())) / self._num_losses, self._ranks).tolist()
        elapsed_s = time.perf_counter() - self._start_s
        num_images, num_skipped = (mean_over_ranks(counts, self._ranks) * self._ranks.world_size).tolist()
        record = dict(zip(self._sums, losses, strict=True))
        record |= {"images_per_s": num_images / elapsed_s, "data_wait": self.waited_s() / elapsed_s, "skipped": num_skipped}
        total_s = sum(self._stages.values()) or 1
        record |= {f"wait_{stage}": record["data_wait"] * seconds / total_s for stage, seconds in self._stages.items()}
        record["time"] = round(time.time(), 3)
        self.restart()
        if not all(math.isfinite(value) for value in losses):
            terms = ", ".join(f"{name} {value}" for name, value in zip(record, losses, strict=False))
            raise DataError(
                f"the loss is no longer finite ({terms}), so training stops; the last checkpoint is kept. "
                "Try a lower optim.lr_per_256, a longer optim.warmup_epochs, or train.precision=fp32, with --restart"
            )
        return record


def waiting_note(record: Mapping[str, float]) -> str:
    """Of a record: how long the device waited and, if that matters, what for."""
    stages = {name.removeprefix("wait_"): share for name, share in record.items() if name.startswith("wait_")}
    slowest = max(stages, key=stages.__getitem__, default="")
    what = f", most of it for {slowest}" if slowest and record["data_wait"] >= 0.05 else ""
    return f"{record['data_wait']:.0%} waiting for data{what}"


def _timed_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _uploaded(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> Batch:
    current = torch.cuda.current_stream(device)
    views = {}
    for name, view in batch.views.items():
        if view.device != device:
            with torch.cuda.stream(stream):
                view = (view if view.is_pinned() else view.pin_memory()).to(device, non_blocking=True)
            view.record_stream(current)  # its memory is used by the computation, beyond the upload's stream
        views[name] = view
    current.wait_stream(stream)
    return replace(batch, views=views)


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
