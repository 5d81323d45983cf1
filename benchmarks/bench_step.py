"""The training step: does the loader keep up with it, and what do its choices gain over a plain step?

Three groups. "feeding": the step alone on views that lie on the device, the loader alone, and both together; the row of the latter names
the bottleneck. "step": ORL's step with each choice of memory format, precision, compilation and joined views, against a plain one as one
would write it (float32, contiguous, one kernel per parameter for optimizer and target network, the loss read in every step). "update":
optimizer and target network alone. With `--step-ms`, `benchmarks.rehearsal` runs instead.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Contender, Row, compare
from benchmarks.photographs import load_jpegs
from orl_fast.config import Config
from orl_fast.distributed import Ranks
from orl_fast.methods import ORL
from orl_fast.recipe import load_config, with_overrides
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, PairTable
from orl_fast.train.metrics import Meter
from orl_fast.train.step import TrainStep
from orl_fast.views.draw import Mined
from orl_fast.views.loader import ViewLoader
from orl_fast.views.plan import Batch

_NUM_ROIS = 10


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """ResNet-50, the paper's sizes, batch 256 (128 where choices are compared) on a GPU; on the CPU the tiny recipe."""
    gpu = torch.cuda.is_available()
    ranks = Ranks(device=torch.device("cuda", 0) if gpu else torch.device("cpu"))
    config = load_config("coco-r50" if gpu else "tiny", overrides=[f"batch_size={256 if gpu else 16}"])
    num_steps, rounds = (20, 5) if gpu else (4, 5)
    if quick:
        num_steps, rounds = (5, 3) if gpu else (2, 2)
    small = with_overrides(config, [f"batch_size={config.train.batch_size // 2}"])
    return [
        *_feeding(config, source, ranks=ranks, num_steps=num_steps, rounds=rounds),
        *_choices(small if gpu else config, ranks=ranks, num_steps=num_steps, rounds=rounds, compile_too=not quick),
        *_updates(config, ranks=ranks, rounds=rounds),
    ]


def _feeding(config: Config, source: Path | None, *, ranks: Ranks, num_steps: int, rounds: int) -> list[Row]:
    batch = config.train.batch_size
    step, meter = _OurStep(config, ranks), Meter(ranks)
    fixed = synthetic_views(config, device=ranks.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        index = _packed(source, Path(folder), num_images=4 * batch)
        mined, seed = made_up_tables(index), config.train.seed
        both, alone = (
            stack.enter_context(
                ViewLoader.open(
                    index, ORL.views(config), batch_size=batch, seed=seed, mined=mined, loader=config.loader, device=ranks.device
                )
            )
            for _ in range(2)
        )

        def load() -> float:
            for _ in islice(meter.feed(alone), config.loader.prefetch + num_steps):
                pass
            _finish(ranks)
            return num_steps * batch

        def load_and_step() -> float:
            batches = meter.feed(both)
            for _ in range(config.loader.prefetch):  # rendered while others were measured: they do not count
                next(batches)
            return step.run(batches, num_steps)

        contenders = [
            Contender(name="step alone", run=lambda: step.run(repeat(fixed), num_steps)),
            Contender(name="loader alone (six views)", run=load),
            Contender(name="both together", run=load_and_step),
        ]
        rows = compare(contenders, unit="images/s", rounds=rounds, group="feeding")
    step_rate, loader_rate, _ = (row.median for row in rows)
    bottleneck = "the step" if loader_rate > step_rate else "the loader"
    return [*rows[:2], replace(rows[2], name=f"both together; the bottleneck is {bottleneck}")]


def _choices(config: Config, *, ranks: Ranks, num_steps: int, rounds: int, compile_too: bool) -> list[Row]:
    fixed = synthetic_views(config, device=ranks.device)
    choices = {
        "float32, contiguous": ("precision=fp32", "channels_last=false"),
        "float32, channels_last": ("precision=fp32", "channels_last=true"),
        "bf16, contiguous": ("precision=bf16", "channels_last=false"),
        "bf16, channels_last": ("precision=bf16", "channels_last=true"),
        "bf16, channels_last, joined views": ("precision=bf16", "channels_last=true", "joined_views=true"),
    }
    if compile_too:
        choices["bf16, channels_last, compiled"] = ("precision=bf16", "channels_last=true", "compile=true")
    contenders = [Contender(name="plain step", run=_plain_step(config, ranks, fixed, num_steps))]
    for name, overrides in choices.items():
        step = _OurStep(with_overrides(config, overrides), ranks)
        contenders.append(Contender(name=name, run=lambda step=step: step.run(repeat(fixed), num_steps)))  # type: ignore[misc]
    return compare(contenders, unit="images/s", rounds=rounds, group=f"step of {config.model.backbone}, {config.train.batch_size} images")


def _updates(config: Config, *, ranks: Ranks, rounds: int, repeats: int = 10) -> list[Row]:
    def contender(name: str, update: Callable[[], None]) -> Contender:
        def run() -> float:
            for _ in range(repeats):
                update()
            _finish(ranks)
            return repeats

        return Contender(name=name, run=run)

    ours = TrainStep("orl", config, ranks=ranks)
    plain = ORL(config).to(ranks.device)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.0, momentum=0.9, foreach=False, fused=False)
    for method in (ours.method, plain):
        for parameter in method.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def update_plainly() -> None:
        optimizer.step()
        _average_plainly(plain)

    def update() -> None:
        ours.optimizer.step()
        ours.method.after_step(0, 100)

    contenders = [contender("one parameter after the other", update_plainly), contender("fused SGD, foreach average", update)]
    return compare(contenders, unit="updates/s", rounds=rounds, group="update of weights and target")


class _OurStep:
    """The step of `orl-fast train`, at learning rate 0."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._step, self._meter, self._ranks, self._batch = (
            TrainStep("orl", config, ranks=ranks),
            Meter(ranks),
            ranks,
            config.train.batch_size,
        )
        self._step.connect()

    def run(self, batches: Iterator[Batch], num_steps: int) -> float:
        """The images that it took."""
        for step in range(num_steps):
            self._step(batches, step=step, num_steps=num_steps, lr=0.0, meter=self._meter)
        self._meter.read()  # waits for the device
        return num_steps * self._batch


def _plain_step(config: Config, ranks: Ranks, batch: Batch, num_steps: int) -> Callable[[], float]:
    method = ORL(config).to(ranks.device)
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], lr=0.0, momentum=0.9, weight_decay=1e-4, foreach=False, fused=False
    )

    def run() -> float:
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = method.loss(batch.views)["loss"]
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            _average_plainly(method)
            loss.item()
        return num_steps * config.train.batch_size

    return run


@torch.no_grad()
def _average_plainly(method: ORL) -> None:
    for target, online in zip(method.target.parameters(), method.online.parameters(), strict=True):
        target.mul_(0.99).add_(online, alpha=0.01)


def synthetic_views(config: Config, *, device: torch.device) -> Batch:
    """ORL's views of a batch, of noise, on the device."""
    generator, num, nothing = torch.Generator().manual_seed(0), config.train.batch_size, np.empty(0, np.int64)
    views: dict[str, Tensor] = {}
    for spec in ORL.views(config):
        noise = torch.randint(0, 256, (num, 3, spec.size_px, spec.size_px), dtype=torch.uint8, generator=generator)
        views[spec.name] = noise.to(device).to(memory_format=torch.channels_last)
    return Batch(views=views, rows=np.arange(num), bad_rows=nothing, bad_sources=nothing)


def made_up_tables(index: ShardIndex) -> Mined:
    """Ten random RoIs per image, a random partner RoI of ten random neighbors: what they show does not matter to speed."""
    rng, n, r = np.random.default_rng(0), len(index), _NUM_ROIS
    size = np.stack([index.widths, index.heights], axis=1)[:, None]  # [N, 1, 2]
    start = rng.uniform(0, 0.6, (n, r, 2)) * size
    stop = start + rng.uniform(0.25, 0.4, (n, r, 2)) * size
    boxes = np.concatenate([start, stop], axis=2).astype(np.int16).reshape(-1, 4)
    pairs = PairTable(
        neighbors=rng.integers(0, n, (n, r)),
        first=np.arange(n * r, dtype=np.int64).reshape(n, r),
        count=np.ones((n, r), np.int32),
        query_roi=rng.integers(0, r, n * r).astype(np.int16),
        partner_roi=rng.integers(0, r, n * r).astype(np.int16),
        similarities=np.ones(n * r, np.float32),
    )
    return Mined(rois=BoxTable(offsets=np.arange(n + 1, dtype=np.int64) * r, boxes=boxes), pairs=pairs)


def _packed(source: Path | None, folder: Path, *, num_images: int) -> ShardIndex:
    """The packed folder given, if it is one and large enough; else its photographs, repeated as often as needed."""
    if source is not None and (source / "manifest.json").is_file() and len(index := ShardIndex.open(source)) >= num_images:
        return index
    return packed_photographs(source, folder, num_images=num_images)


def packed_photographs(source: Path | None, folder: Path, *, num_images: int) -> ShardIndex:
    """Photographs of the source, repeated as often as needed, packed in `folder`."""
    jpegs = load_jpegs(source, limit=num_images)
    (folder / "photographs").mkdir()
    for i in range(num_images):
        (folder / "photographs" / f"{i:06d}.jpg").write_bytes(jpegs[i % len(jpegs)])
    write_shards([folder / "photographs"], folder / "packed")
    return ShardIndex.open(folder / "packed")


def _finish(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
