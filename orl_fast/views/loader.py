"""The loader: for every step the views of its images, rendered ahead in the background."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from orl_fast.config import LoaderConfig
from orl_fast.console import log
from orl_fast.errors import ConfigError
from orl_fast.shards import ShardIndex
from orl_fast.views.choose import faster_renderer, open_renderer, open_source
from orl_fast.views.draw import Mined, draw_plan
from orl_fast.views.plan import Batch, ImageSource, ReadsAhead, Renderer, Rows, ViewPlan
from orl_fast.views.sampler import Sampler
from orl_fast.views.specs import ViewSpec

DrawPlan = Callable[[Rows, int], ViewPlan]
_BATCHES_AT_WORK = 2  # one is decoded while the other is drawn
_PLANS_AHEAD = 2  # of the batches that are rendered
_DEFAULTS = LoaderConfig()


class ViewLoader(AbstractContextManager["ViewLoader"]):
    """Iterates over micro-batches of views; a second `for` continues where the first stopped. Close it, or use it as a context manager.

    What it yields depends on the data, the seed and the step alone: not on threads, prefetching or speed; ranks and accumulation only
    share a global batch (see `Sampler`). A step number is its whole state. `num_skipped` images were left out so far.
    """

    def __init__(
        self, renderer: Renderer, draw: DrawPlan, *, sampler: Sampler, rank: int = 0, start_step: int = 0, num_steps: int | None = None,
        prefetch: int = 2, name_of: Callable[[int], str] = str, source: ImageSource | None = None, kind: str = "",
    ) -> None:  # fmt: skip
        """Start rendering ahead: `prefetch` micro-batches. The renderer (named `kind`) and the source are closed with the loader.

        Args:
            draw: (rows [B], epoch) -> the plan of their views; called from another thread.
            num_steps: steps from `start_step` on, of `sampler.accumulate` micro-batches each; None: without end.
            name_of: what the log calls a source (see `Crops.source`) that cannot be decoded.
        """
        self.sampler, self.renderer, self.renderer_kind, self.num_skipped = sampler, renderer, kind, 0
        self._draw, self._source, self._name_of, self._rank, self._prefetch = draw, source, name_of, rank, prefetch
        self._logged: set[int] = set()
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plans")
        self._threads = ThreadPoolExecutor(_BATCHES_AT_WORK, thread_name_prefix="views")
        self._submitted = self._submit(start_step, num_steps)
        self._pending = deque(islice(self._submitted, prefetch))

    @classmethod
    def open(
        cls, shards: Path | ShardIndex, specs: Sequence[ViewSpec], *, batch_size: int, seed: int = 0, mined: Mined | None = None,
        source: ImageSource | None = None, loader: LoaderConfig = _DEFAULTS, rank: int = 0, world_size: int = 1, accumulate: int = 1,
        device: torch.device | None = None, num_threads: int = 0, start_step: int = 0, num_steps: int | None = None,
        rows: Rows | None = None,
    ) -> "ViewLoader":  # fmt: skip
        """A loader of any views of the packed images in a folder, or of its open index.

        Args:
            batch_size: images per step, over all ranks and micro-batches.
            mined: RoIs and pairs, where some view is cut from them.
            source: where images are read from, by default the one that `loader.source` names.
            device: where the views go; decides whether the GPU may render.
            num_threads: for rendering, unless `loader.num_threads` is set; 0: all cores of this process.
            rows: the images to draw from, for example those with a label; by default all.
        Raises:
            ConfigError: two views share a name or a stream, the batch cannot be shared by the ranks, is larger than the data, or the
                renderer cannot run here.
            DataError: the shards are missing or damaged. MissingStageError: a view needs RoIs and `mined` is None.
        """
        if not len(specs) == len({spec.name for spec in specs}) == len({spec.stream for spec in specs} & set(range(1, 16))) > 0:
            raise ConfigError(f"views {[(spec.name, spec.stream) for spec in specs]}: each needs a name and a stream, 1 to 15, of its own")
        index = shards if isinstance(shards, ShardIndex) else ShardIndex.open(shards)
        num_images = len(index) if rows is None else len(rows)
        sampler = Sampler(num_images=num_images, batch_size=batch_size, world_size=world_size, accumulate=accumulate, seed=seed)

        def draw(positions: Rows, epoch: int) -> ViewPlan:
            chosen = positions if rows is None else rows[positions]
            return draw_plan(chosen, specs, seed=seed, epoch=epoch, heights=index.heights, widths=index.widths, mined=mined)

        trial = draw(np.arange(sampler.micro_batch, dtype=np.int64), 0)  # also raises here what it would raise in the background
        source = open_source(index, loader, images=source, patches=mined.patches if mined is not None else None, shrunken=True)
        kind: str = loader.renderer
        if kind == "auto":
            kind = faster_renderer(source, loader, trial=trial, device=device, num_threads=num_threads)
        return cls(
            open_renderer(kind, source, loader, device=device, num_threads=num_threads), draw,
            sampler=sampler, kind=kind, rank=rank, start_step=start_step, num_steps=num_steps, prefetch=loader.prefetch, source=source,
            name_of=lambda i: f"image {index.keys[i]}" if i < len(index) else f"patch {i - len(index)}",
        )  # fmt: skip

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft().result()
        self.num_skipped += len(batch.bad_rows)
        for source in set(batch.bad_sources.tolist()) - self._logged:
            self._logged.add(source)
            log.warning("%s cannot be decoded; its samples are skipped (orl-fast verify checks all)", self._name_of(source))
        self._pending.extend(islice(self._submitted, self._prefetch - len(self._pending)))
        return batch

    def close(self) -> None:
        """Stop rendering; let go of threads, files and memory."""
        self._pending.clear()
        self._planner.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        self.renderer.close()
        if self._source is not None:
            self._source.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, start_step: int, num_steps: int | None) -> Iterator[Future[Batch]]:
        """Plans are drawn a few batches before they are rendered, so that the source can read ahead."""
        plans: deque[Future[ViewPlan]] = deque()
        for step in islice(count(start_step), num_steps):
            for micro in range(self.sampler.accumulate):
                rows = self.sampler.rows(step, rank=self._rank, micro=micro)
                plans.append(self._planner.submit(self._plan, rows, self.sampler.epoch_of(step)))
                if len(plans) > _PLANS_AHEAD:
                    yield self._threads.submit(self._render, plans.popleft(), time.perf_counter())
        while plans:
            yield self._threads.submit(self._render, plans.popleft(), time.perf_counter())

    def _plan(self, rows: Rows, epoch: int) -> ViewPlan:
        plan = self._draw(rows, epoch)
        if isinstance(self._source, ReadsAhead):
            self._source.announce(plan)
        return plan

    def _render(self, plan: Future[ViewPlan], submitted_s: float) -> Batch:
        started_s = time.perf_counter()
        batch = self.renderer.render(plan.result())
        return replace(batch, seconds={"queue": started_s - submitted_s, **batch.seconds})
