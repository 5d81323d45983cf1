"""Batches on their way to the device: uploads overlap with the computation, and waiting is counted."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from orl_fast.train.metrics import WaitClock
from orl_fast.views.plan import Batch


def on_device(batches: Iterable[Batch], device: torch.device, *, clock: WaitClock) -> Iterator[Batch]:
    """Yield batches whose tensors are, or will be before the current stream needs them, on the device.

    While a GPU works on one batch the host has already asked for the next, and a stream of its own copies it: pinned memory, uint8.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    iterator = iter(batches)
    in_use: tuple[Batch, torch.cuda.Event] | None = None
    while True:
        start_s = time.perf_counter()
        batch = next(iterator, None)
        clock.host_waited(time.perf_counter() - start_s)
        if batch is None:
            return
        if stream is not None:
            batch = _uploaded(batch, device, stream)
            clock.arrived()
        yield batch
        clock.computed()
        if stream is not None:
            # The GPU renderer's views are DALI's memory, which torch's allocator does not know: they are held until their work is done.
            if in_use is not None:
                in_use[1].synchronize()
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            in_use = batch, done


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
