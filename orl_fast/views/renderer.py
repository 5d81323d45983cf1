"""What a renderer takes and gives. Renderers: `reference` (PIL and torchvision), `cpu` (DALI and numba), `gpu` (one DALI graph)."""

import os
import timeit
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.config import LoaderConfig
from orl_fast.console import log
from orl_fast.errors import ConfigError
from orl_fast.views.plan import Rows, ViewPlan

_TRIALS = 3


class ImageSource(Protocol):
    """Encoded images by row, without a copy: a ShardReader, or a PatchedSource."""

    def view(self, i: int, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The views of a plan, without the samples of which a source could not be decoded."""

    batches: tuple[torch.Tensor, ...]  # per slot, [B', 3, S, S] uint8, channels_last
    rows: Rows  # [B'] the images rendered
    bad_rows: Rows  # [B - B'] the images dropped
    bad_sources: Rows  # what could not be decoded: rows, and numbers of patches (see `Crops.source`)


class Renderer(Protocol):
    """Renders plans; safe to call from several threads."""

    def render(self, plan: ViewPlan) -> Rendered: ...

    def close(self) -> None: ...


def usable_samples(plan: ViewPlan, bad_sources: Rows) -> NDArray[np.bool_]:
    """[B]: which samples need no bad source in any slot."""
    bad = np.isin(plan.crops.source, bad_sources).reshape(len(plan.slots), len(plan.rows))
    return np.logical_not(bad.any(axis=0))


def without_bad(plan: ViewPlan, pixels: Iterable[torch.Tensor], bad_sources: Rows) -> Rendered:
    """The usable samples of pixels [B, S, S, 3], one tensor per slot."""
    kept = usable_samples(plan, bad_sources)
    batches = tuple((batch if kept.all() else batch[torch.from_numpy(kept)]).permute(0, 3, 1, 2) for batch in pixels)
    return Rendered(batches=batches, rows=plan.rows[kept], bad_rows=plan.rows[~kept], bad_sources=bad_sources)


def choose_renderer(
    source: ImageSource, loader: LoaderConfig, *, trial: ViewPlan, device: torch.device | None = None, num_threads: int = 0
) -> Renderer:
    """Open the renderer that `loader.renderer` names; "auto": the faster one here, measured on a GPU machine, and says why.

    Args:
        trial: a typical plan, to measure with.
        device: where training runs; None or a CPU: the GPU is not asked.
        num_threads: unless `loader.num_threads` says otherwise; 0: all cores of this process.
    Raises:
        ConfigError: "gpu" without a CUDA device.
    """
    on_gpu = device is not None and device.type == "cuda"
    threads = loader.num_threads or num_threads or len(os.sched_getaffinity(0))

    def open_one(kind: str) -> Renderer:
        if kind == "reference":
            from orl_fast.views.reference import ReferenceRenderer

            return ReferenceRenderer(source)
        if kind == "cpu":
            from orl_fast.views.cpu import CpuRenderer

            return CpuRenderer(source, num_threads=threads)
        from orl_fast.views.gpu import DaliRenderer

        if kind == "gpu" and not on_gpu:
            raise ConfigError("loader.renderer = gpu: this run has no CUDA device; use loader.renderer=cpu or auto")
        chosen = device if kind == "gpu" else None
        return DaliRenderer(source, num_threads=threads, device=chosen, hw_decoder_load=loader.hw_decoder_load)

    if loader.renderer != "auto":
        return open_one(loader.renderer)
    if not on_gpu:
        return open_one("cpu")
    return _faster({kind: open_one(kind) for kind in ("cpu", "gpu")}, trial)


def _faster(renderers: dict[str, Renderer], trial: ViewPlan) -> Renderer:
    def render(kind: str) -> None:
        renderers[kind].render(trial)
        torch.cuda.synchronize()

    rates: dict[str, float] = {}
    for kind in renderers:
        render(kind)  # compiles, allocates, warms up
        rates[kind] = len(trial.rows) / min(timeit.repeat(partial(render, kind), number=1, repeat=_TRIALS))
    best = max(rates, key=rates.__getitem__)
    for kind, renderer in renderers.items():
        if kind != best:
            renderer.close()
    measured = ", ".join(f"{kind} {rate:,.0f} samples/s" for kind, rate in rates.items())
    log.info("views are rendered on the %s: measured %s (loader.renderer forces one)", best.upper(), measured)
    return renderers[best]
