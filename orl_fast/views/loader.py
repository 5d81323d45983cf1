"""The loader: for every step the views of its images, rendered ahead in the background."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import ConfigError
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.tables import PairTable, RoiTable
from orl_fast.views.plan import TERMS, Rows, ViewPlan, draw_byol, draw_orl
from orl_fast.views.renderer import ImageSource, Renderer, choose_renderer
from orl_fast.views.sampler import Sampler
from orl_fast.views.sources import PatchedSource, PatchStore

DrawPlan = Callable[[Rows, int], ViewPlan]
_BATCHES_AT_WORK = 2  # one is decoded while the other is drawn


@dataclass(frozen=True, kw_only=True)
class Views:
    """One micro-batch: for each term of the loss its two views, [B, 3, S, S] uint8 channels_last; None where it is not drawn."""

    image: tuple[Tensor, Tensor] | None = None
    intra: tuple[Tensor, Tensor] | None = None
    inter: tuple[Tensor, Tensor] | None = None
    rows: Rows  # [B] the images
    num_skipped: int = 0  # images left out because they, or their neighbor, could not be decoded


class ViewLoader:
    """Iterates over micro-batches of views; a second `for` goes on where the first stopped. Close it, or use it as a context manager.

    What it yields depends on the data, the seed and the step alone: not on threads, prefetching or speed; ranks and accumulation only share
    a global batch (see `Sampler`). A step number is its whole state. `num_skipped` images were left out so far.
    """

    def __init__(
        self,
        renderer: Renderer,
        draw: DrawPlan,
        *,
        num_images: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        drop_last: bool = True,
        start_step: int = 0,
        num_steps: int | None = None,
        prefetch: int = 2,
        name_of: Callable[[int], str] = str,
    ) -> None:
        """Start rendering ahead.

        Args:
            renderer: closed with the loader.
            draw: (rows [B], epoch) -> the plan of their views; called from several threads.
            batch_size: images per micro-batch; a step has `accumulate` micro-batches on each of `world_size` ranks.
            num_steps: steps from `start_step` on; None: without end.
            prefetch: micro-batches rendered ahead.
            name_of: what the log calls a source (see `Crops.source`) that cannot be decoded.
        Raises:
            ConfigError: there are fewer images than a global batch holds, and drop_last.
        """
        self.sampler = Sampler(
            num_images=num_images, micro_batch=batch_size, world_size=world_size, accumulate=accumulate, seed=seed, drop_last=drop_last
        )
        self.renderer = renderer
        self.num_skipped = 0
        self._draw, self._name_of, self._rank = draw, name_of, rank
        self._logged: set[int] = set()
        self._ahead = prefetch
        self._todo = self._batches(start_step, num_steps)
        self._pending: deque[Future[Views]] = deque()
        self._threads = ThreadPoolExecutor(_BATCHES_AT_WORK, thread_name_prefix="views")
        self._fill()

    @classmethod
    def open(
        cls,
        shards: Path | ShardIndex,
        *,
        config: Config | None = None,
        rois: RoiTable | None = None,
        pairs: PairTable | None = None,
        patches: PatchStore | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        num_threads: int = 0,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> "ViewLoader":
        """The loader that training uses: ORL's views where RoIs and pairs are given, BYOL's otherwise.

        Args:
            shards: a folder of packed images, or its open index.
            config: batch, seed, views, loss weights (a term of weight 0 is not drawn) and loader; the paper's by default.
            pairs: already limited to the neighbors and the ratio in use (`PairTable.limited`).
            patches: stored partner patches of these RoIs.
            device: where training runs; decides whether the GPU may render.
            num_threads: for rendering, unless `config.loader.num_threads` says otherwise; 0: all cores of this process.
        Raises:
            ConfigError: the batch cannot be shared by the ranks, is larger than the data, or the renderer cannot run here.
            DataError: the shards are missing or damaged.
        """
        config = config or Config()
        index = shards if isinstance(shards, ShardIndex) else ShardIndex.open(shards)
        options, num_images, heights, widths = config.train, len(index), index.heights, index.widths
        micro_batch, rest = divmod(options.batch_size, world_size * options.accumulate)
        if rest:
            raise ConfigError(
                f"train.batch_size = {options.batch_size}: cannot be shared by {world_size} ranks with {options.accumulate} micro-batches "
                f"each; use a multiple of {world_size * options.accumulate}"
            )
        source: ImageSource = ShardReader(index)
        patch_rows = None
        if patches is not None and config.loader.use_patches:
            source, patch_rows = PatchedSource(source, patches, num_images=num_images), patches.rows
        terms = [term for term in TERMS if getattr(config.orl, f"{term}_weight") > 0]

        def draw(rows: Rows, epoch: int) -> ViewPlan:
            if rois is None or pairs is None:
                return draw_byol(rows, seed=options.seed, epoch=epoch, heights=heights, widths=widths, views=config.views)
            return draw_orl(
                rows, seed=options.seed, epoch=epoch, heights=heights, widths=widths, views=config.views,
                rois=rois, pairs=pairs, terms=terms, compat=config.compat, patch_rows=patch_rows,
            )  # fmt: skip

        trial = draw(np.arange(min(micro_batch, num_images), dtype=np.int64), 0)
        return cls(
            choose_renderer(source, config.loader, trial=trial, device=device, num_threads=num_threads), draw,
            num_images=num_images, batch_size=micro_batch, seed=options.seed, rank=rank, world_size=world_size,
            accumulate=options.accumulate, start_step=start_step, num_steps=num_steps, prefetch=config.loader.prefetch,
            name_of=lambda i: f"image {index.keys[i]}" if i < num_images else f"patch {i - num_images}",
        )  # fmt: skip

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Views]:
        return self

    def __next__(self) -> Views:
        if not self._pending:
            raise StopIteration
        views = self._pending.popleft().result()
        self.num_skipped += views.num_skipped
        self._fill()
        return views

    def close(self) -> None:
        """Stop rendering; let go of threads, files and memory."""
        self._pending.clear()
        self._threads.shutdown(cancel_futures=True)
        self.renderer.close()

    def __enter__(self) -> "ViewLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self, start_step: int, num_steps: int | None) -> Iterator[tuple[Rows, int]]:
        for step in islice(count(start_step), num_steps):
            for micro in range(self.sampler.accumulate):
                rows = self.sampler.rows(step, rank=self._rank, micro=micro)
                if len(rows):
                    yield rows, self.sampler.epoch_of(step)

    def _fill(self) -> None:
        while len(self._pending) < self._ahead and (batch := next(self._todo, None)) is not None:
            self._pending.append(self._threads.submit(self._render, *batch))

    def _render(self, rows: Rows, epoch: int) -> Views:
        plan = self._draw(rows, epoch)
        rendered = self.renderer.render(plan)
        for source in set(rendered.bad_sources.tolist()) - self._logged:
            self._logged.add(source)
            log.warning("%s cannot be decoded; its samples are skipped (orl-fast verify checks all)", self._name_of(source))
        terms = {plan.slots[v].term: (rendered.batches[v], rendered.batches[v + 1]) for v in range(0, len(plan.slots), 2)}
        return Views(**terms, rows=rendered.rows, num_skipped=len(rendered.bad_rows))
