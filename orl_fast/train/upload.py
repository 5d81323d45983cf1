"""Batches on their way to the device: uploads run beside the computation, and waiting is counted."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from orl_fast.train.metrics import WaitClock
from orl_fast.views.loader import Views


def on_device(batches: Iterable[Views], device: torch.device, *, clock: WaitClock) -> Iterator[Views]:
    """Yield batches whose tensors are, or will be before the current stream needs them, on the device.

    While a GPU works on one batch the host has already asked for the next, and a stream of its own copies it: pinned memory, uint8.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    iterator = iter(batches)
    while True:
        start_s = time.perf_counter()
        views = next(iterator, None)
        clock.host_waited(time.perf_counter() - start_s)
        if views is None:
            return
        if stream is not None:
            views = _uploaded(views, device, stream)
            clock.arrived()
        yield views
        clock.computed()


def _uploaded(views: Views, device: torch.device, stream: torch.cuda.Stream) -> Views:
    current = torch.cuda.current_stream(device)

    def move(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if pair is None or pair[0].device == device:
            return pair
        with torch.cuda.stream(stream):
            first, second = ((view if view.is_pinned() else view.pin_memory()).to(device, non_blocking=True) for view in pair)
        for moved in (first, second):
            moved.record_stream(current)  # its memory is used by the computation, beyond the upload's stream
        return first, second

    moved = replace(views, image=move(views.image), intra=move(views.intra), inter=move(views.inter))
    current.wait_stream(stream)
    return moved
