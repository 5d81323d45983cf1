"""The real loader feeds a step that takes an accelerator's time and holds no core: how long does the step wait for data?

What `orl-fast bench step --step-ms MS` runs. The step sleeps, so this rehearses on any machine what its cores can feed. The loader renders
ORL's six views of a packed folder, which is made from the photographs in a temporary folder; by JPEG bytes, by JPEG bytes with partner
patches, and by pixel shards; on 1, 2, 4, … and all cores (`sched_setaffinity`, and as many threads). Every round measures, of each of the
three in turn, the loader alone and then the loader with the step.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.bench_step import made_up_tables, packed_photographs
from benchmarks.harness import Columns, Row, iqr, publish
from benchmarks.loading import ORL_VIEWS, pinned
from orl_fast.config import LoaderConfig
from orl_fast.cores import num_cores
from orl_fast.mining.executor import Executor
from orl_fast.mining.pairs import join_patches, pack_patches
from orl_fast.shards import ShardIndex
from orl_fast.shards.pixels import write_pixels
from orl_fast.views.draw import Mined
from orl_fast.views.loader import ViewLoader
from orl_fast.views.patches import PatchStore

# An assumption, not a measurement: what one H100 is estimated to train of ORL (ResNet-50, six views), and the cores that come with it.
H100_IMAGES_PER_S, H100_CORES = 950, 16
NOTE = (
    "Columns: the share of the time in which the step waits for its batch; the images/s that loader and step reach together; and, under "
    '"waits from", the images/s of the loader alone: a step that wants more than that waits. If the loader alone kept fewer cores busy '
    "than it had, others were using the machine, and a quiet one would do better. "
)
_NOTE_AUTO = (
    f"The step's time is an assumption, not a measurement: one H100 trains {H100_IMAGES_PER_S} images/s of ORL and comes with {H100_CORES} "
    f"cores, so each core has to feed {H100_IMAGES_PER_S / H100_CORES:.0f} images/s."
)
_BATCH, _BATCH_QUICK = 64, 32
_MOST_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class FedRow(Row):
    """`median` and `iqr`: images/s of loader and step together; `ratio`: to the step that never waits.

    Attributes:
        cores: that the process had. step_ms: of one step.
        waiting: share of the time, 0 to 1, in which the step waited for its batch.
        waits_from: images/s of the loader alone, from which on a step waits; None in the row of the step that never waits.
    """

    cores: int
    step_ms: float
    waiting: float
    waiting_iqr: float = 0.0
    waits_from: float | None = None
    waits_from_iqr: float = 0.0
    cores_busy: float | None = None  # that the loader alone kept busy, on average


COLUMNS: Columns = {
    "waiting for data": lambda row: f"{row.waiting:.1%} ± {row.waiting_iqr / 2:.1%}",
    "images/s reached": lambda row: f"{row.median:,.1f} ± {row.iqr / 2:,.1f}",
    "waits from": lambda row: "" if row.waits_from is None else f"{row.waits_from:,.1f} ± {row.waits_from_iqr / 2:,.1f} images/s on",
    "cores busy": lambda row: "" if row.cores_busy is None else f"{row.cores_busy:.2f}",
}


class SleepingStep:
    """Steps of fixed length on a schedule of their own, as a GPU runs what is queued: one runs, the next is queued meanwhile.

    A step starts when the one before it ends or when its batch is there, whichever is later. So the schedule is absolute: a host that is
    woken late delays nothing as long as the batch is there before the running step ends.
    """

    def __init__(
        self, step_s: float, *, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._step_s, self._clock, self._sleep = step_s, clock, sleep

    def run(self, batches: Iterator[object], num_steps: int, *, uncounted: int = 0) -> float:
        """Seconds that the steps waited for their batches, after the first one and `uncounted` more."""
        next(batches)
        ends_s, waited_s = self._clock() + self._step_s, 0.0
        for i in range(uncounted + num_steps):
            next(batches)  # while the step before runs
            starts_s = max(self._clock(), ends_s)
            if i >= uncounted:
                waited_s += starts_s - ends_s
            ends_s = starts_s + self._step_s
            self._sleep(max(0.0, starts_s - self._clock()))  # there is room in the queue when this step has started
        return waited_s


def report(source: Path | None, json_path: Path, *, step_ms: float | None, batch: int | None, quick: bool) -> None:
    """Run it; print its table, write JSON and a picture. `step_ms` None: a batch's time at an H100's rate, scaled by cores."""
    rows = run(source, step_ms=step_ms, batch=batch or (_BATCH_QUICK if quick else _BATCH), quick=quick)
    title = f"orl-fast bench step --step-ms {'auto' if step_ms is None else f'{step_ms:g}'}" + (" --quick" if quick else "")
    publish(title, rows, json_path, columns=COLUMNS, note=NOTE + (_NOTE_AUTO if step_ms is None else ""))


def assumed_step_s(batch: int, *, cores: int) -> float:
    """Seconds that a batch takes on the share of an H100 that so many cores have to feed."""
    return batch / (H100_IMAGES_PER_S * cores / H100_CORES)


def run(source: Path | None, *, step_ms: float | None, batch: int, quick: bool, core_counts: list[int] | None = None) -> list[FedRow]:
    """Rows of the step that never waits and of the three ways to feed it, by number of cores (default: powers of two, and all)."""
    num_steps, rounds = (4, 2) if quick else (10, 5)
    cores = sorted(os.sched_getaffinity(0))[: num_cores()]
    counts = core_counts or sorted({*(2**k for k in range(12) if 2**k < len(cores)), len(cores)})
    rows: list[FedRow] = []
    with tempfile.TemporaryDirectory() as folder:
        # Of few images, many neighbors would be in the same batch, and their images be decoded once for both.
        num_images = max(2 * batch, min(8 * batch, _MOST_IMAGES))
        index = packed_photographs(source, Path(folder), num_images=num_images)
        write_pixels(index)
        mined = made_up_tables(index)
        patched = replace(mined, patches=_pack_patches(mined, index, Path(folder)))
        for count in counts:
            with pinned(cores[:count]):
                step_s = assumed_step_s(batch, cores=count) if step_ms is None else step_ms / 1e3
                rows += _fed(index, mined, patched, batch=batch, step_s=step_s, cores=count, num_steps=num_steps, rounds=rounds)
    return rows


def _fed(
    index: ShardIndex, mined: Mined, patched: Mined, *, batch: int, step_s: float, cores: int, num_steps: int, rounds: int
) -> list[FedRow]:
    ways = {
        "JPEG bytes": (mined, LoaderConfig(renderer="cpu", num_threads=cores, pixels="never")),
        "JPEG bytes, partner patches": (patched, LoaderConfig(renderer="cpu", num_threads=cores, pixels="never")),
        "pixel shards": (mined, LoaderConfig(renderer="cpu", num_threads=cores, pixels="always")),
    }
    ahead = LoaderConfig().prefetch + 2  # batches that may be done when it begins: they do not count
    own_rate, step = batch / step_s, SleepingStep(step_s)
    rates, busy, waited_s = np.zeros((3, len(ways), rounds))
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(ViewLoader.open(index, ORL_VIEWS, batch_size=batch, mined=tables, loader=config))
            for tables, config in ways.values()
        ]
        for loader in loaders:
            next(loader)  # pays for compilation
        for round_ in range(rounds):
            for i in range(len(loaders)) if round_ % 2 == 0 else reversed(range(len(loaders))):
                seconds, busy[i, round_] = _drain(loaders[i], num_steps, uncounted=ahead)
                rates[i, round_] = num_steps * batch / seconds
                waited_s[i, round_] = step.run(loaders[i], num_steps, uncounted=ahead)
    wanted = num_steps * step_s
    ratios = wanted / (wanted + waited_s)
    group = f"{cores} core{'s' * (cores > 1)}; a step takes {1e3 * step_s:,.0f} ms for {batch} images"
    rows = [
        FedRow(
            name="the step, if it never waited", unit="images/s", median=own_rate, iqr=0.0, ratio=1.0, group=group,
            cores=cores, step_ms=1e3 * step_s, waiting=0.0,
        )
    ]  # fmt: skip
    for i, name in enumerate(ways):
        rows.append(
            FedRow(
                name=name, unit="images/s", median=float(own_rate * np.median(ratios[i])), iqr=own_rate * iqr(ratios[i]),
                ratio=float(np.median(ratios[i])), ratio_iqr=iqr(ratios[i]), group=group, cores=cores, step_ms=1e3 * step_s,
                waiting=float(np.median(1 - ratios[i])), waiting_iqr=iqr(ratios[i]),
                waits_from=float(np.median(rates[i])), waits_from_iqr=iqr(rates[i]), cores_busy=float(np.median(busy[i])),
            )
        )  # fmt: skip
    return rows


def _drain(batches: Iterator[object], num: int, *, uncounted: int) -> tuple[float, float]:
    """Seconds that `num` batches take, and how many cores this process kept busy meanwhile."""
    for _ in islice(batches, uncounted):
        pass
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for _ in islice(batches, num):
        pass
    seconds = time.perf_counter() - start_s
    return seconds, (time.process_time() - start_cpu_s) / seconds


def _pack_patches(mined: Mined, index: ShardIndex, folder: Path) -> PatchStore:
    """As `orl-fast mine patches` stores them."""
    for name, table in (("rois", mined.rois), ("pairs", mined.pairs)):
        (folder / name).mkdir()
        table.write_arrays(folder / name)
    (folder / "patches").mkdir()
    for _ in pack_patches(folder / "patches", range(index.num_shards), index=index, executor=Executor(num_workers=num_cores())):
        pass
    join_patches(folder / "patches", num_shards=index.num_shards)
    return PatchStore(folder / "patches")
