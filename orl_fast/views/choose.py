"""Which source images are read from and which renderer draws them: a literal table of each."""

import timeit
from collections.abc import Callable
from contextlib import closing

import torch

from orl_fast.config import LoaderConfig
from orl_fast.console import log
from orl_fast.cores import num_cores
from orl_fast.errors import ConfigError
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.views.patches import PatchedSource, PatchStore
from orl_fast.views.pixels import with_pixels
from orl_fast.views.plan import ImageSource, Renderer, ViewPlan

SOURCES: dict[str, Callable[[ShardIndex], ImageSource]] = {"mmap": ShardReader}
_TRIALS = 3


def open_source(
    index: ShardIndex, loader: LoaderConfig, *, images: ImageSource | None = None, patches: PatchStore | None = None, shrunken: bool = False
) -> ImageSource:
    """The source of a data set's images, and of stored patches beyond the last image.

    The images come from `images`, or from what `loader.source` names and from stored pixels (see `with_pixels`).
    ConfigError: no such source. DataError: stored pixels are damaged, or not where `loader.pixels_dir` says.
    """
    if images is None:
        if loader.source not in SOURCES:
            raise ConfigError(f"loader.source = {loader.source!r}: use one of {', '.join(SOURCES)}")
        images = with_pixels(SOURCES[loader.source](index), index, loader, shrunken=shrunken)
    return PatchedSource(images, patches, num_images=len(index)) if patches is not None else images


def open_renderer(
    kind: str, source: ImageSource, loader: LoaderConfig, *, device: torch.device | None = None, num_threads: int = 0
) -> Renderer:
    """The renderer of this name: "cpu" (also "auto"), "gpu", "reference", or "dali-cpu" (the GPU's graph on the CPU, a cross-check).

    Views go to `device`. `num_threads` holds unless `loader.num_threads` is set; 0: all cores of this process. ConfigError: no such
    renderer, or "gpu" without a CUDA device.
    """
    threads = loader.num_threads or num_threads or num_cores()
    on_gpu = device is not None and device.type == "cuda"
    match kind:  # each imports its own heavy libraries
        case "reference":
            from orl_fast.views.reference import ReferenceRenderer

            return ReferenceRenderer(source)
        case "cpu" | "auto":
            from orl_fast.views.cpu import CpuRenderer

            return CpuRenderer(source, num_threads=threads, pin_memory=on_gpu)
        case "gpu" | "dali-cpu":
            from orl_fast.views.gpu import DaliRenderer

            if kind == "gpu" and not on_gpu:
                raise ConfigError("loader.renderer = gpu: this run has no CUDA device; use loader.renderer=cpu or auto")
            used = device if kind == "gpu" else None
            return DaliRenderer(source, num_threads=threads, device=used, hw_decoder_load=loader.hw_decoder_load)
    raise ConfigError(f"loader.renderer = {kind!r}: use one of auto, cpu, gpu, reference, dali-cpu")


def faster_renderer(
    source: ImageSource, loader: LoaderConfig, *, trial: ViewPlan, device: torch.device | None = None, num_threads: int = 0
) -> str:
    """What "auto" stands for here: "cpu", or on a GPU machine whichever of "cpu" and "gpu" is faster at a typical plan, measured now.

    The two differ by rounding, so a run asks once and keeps the answer.
    """
    if device is None or device.type != "cuda":
        return "cpu"
    rates: dict[str, float] = {}
    for kind in ("cpu", "gpu"):
        try:
            with closing(open_renderer(kind, source, loader, device=device, num_threads=num_threads)) as renderer:
                rates[kind] = _rate(renderer, trial)
        except RuntimeError as error:
            if kind == "cpu":
                raise
            log.warning("the GPU cannot render here (%s); views are rendered on the CPU", str(error).split("\n")[0])
    best = max(rates, key=rates.__getitem__)
    measured = ", ".join(f"{kind} {rate:,.0f} samples/s" for kind, rate in rates.items())
    log.info("views are rendered on the %s: measured %s (loader.renderer overrides)", best.upper(), measured)
    return best


def _rate(renderer: Renderer, trial: ViewPlan) -> float:
    """Samples per second."""

    def render() -> None:
        renderer.render(trial)
        torch.cuda.synchronize()

    render()  # compiles, allocates, warms up
    return len(trial.rows) / min(timeit.repeat(render, number=1, repeat=_TRIALS))
