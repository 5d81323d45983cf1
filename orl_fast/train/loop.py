"""The training loop: batches in, checkpoints and metrics out."""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch

from orl_fast.checkpoint import CHECKPOINT, PREVIOUS
from orl_fast.config import Config, LoaderConfig, RendererName, digest
from orl_fast.console import log, log_to_file, progress
from orl_fast.distributed import Agreement, Ranks, broadcast_value, mean_over_ranks, require_same
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.files import atomic_file, locked, remove_leftovers
from orl_fast.methods import METHODS
from orl_fast.models.encoder import is_finite, weights_digest
from orl_fast.recipe import config_to_dict, config_to_toml
from orl_fast.shards import ShardIndex
from orl_fast.train.metrics import Meter, MetricsLog
from orl_fast.train.optim import learning_rate
from orl_fast.train.saving import RunIdentity, earlier_run, require_checkpoint_space, restore, save, save_latest
from orl_fast.train.step import TrainStep
from orl_fast.train.upload import on_device
from orl_fast.views.draw import Mined
from orl_fast.views.loader import ViewLoader
from orl_fast.views.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: steps done in all, of `num_steps`. first_step: done before this call. signum: of the signal that stopped it; 0: none did.
    """

    first_step: int
    step: int
    num_steps: int
    signum: int = 0


def train(
    method: str,
    config: Config,
    *,
    index: ShardIndex,
    folder: Path,
    mined: Mined | None = None,
    ranks: Ranks,
    restart: bool = False,
    max_steps: int | None = None,
) -> Outcome:
    """Train from scratch, or resume where an earlier call was stopped. SIGINT and SIGTERM finish the step and save.

    Args:
        method: a key of `orl_fast.methods.METHODS`.
        folder: the run folder: checkpoint.pt and the one before, metrics.jsonl, tensorboard/, train.log, recipe.toml.
        mined: the tables of stage 2, for methods that draw from them.
        restart: discard what the folder holds of an earlier run.
        max_steps: stop, and save, once so many steps are done in all; another call resumes.
    Raises:
        ConfigError: the batch does not fit the ranks or the data, or ranks differ. StaleError: the folder holds another run.
        DataError: damaged checkpoints, a full disk, another process in this folder, or weights or losses that are not finite.
    """
    _check_size(config, index, ranks)
    with locked(folder, what="orl-fast train") if ranks.is_main else contextlib.nullcontext():
        return _train(method, config, index=index, folder=folder, mined=mined, ranks=ranks, restart=restart, max_steps=max_steps)


def _train(
    method: str,
    config: Config,
    *,
    index: ShardIndex,
    folder: Path,
    mined: Mined | None,
    ranks: Ranks,
    restart: bool,
    max_steps: int | None,
) -> Outcome:
    options = config.train
    sampler = Sampler(
        num_images=len(index), batch_size=options.batch_size, world_size=ranks.world_size, accumulate=options.accumulate, seed=options.seed
    )
    steps_per_epoch, num_steps = sampler.steps_per_epoch, options.epochs * sampler.steps_per_epoch
    open_loader = partial(
        ViewLoader.open, index, METHODS[method].views(config), batch_size=options.batch_size, seed=options.seed, mined=mined,
        rank=ranks.rank, world_size=ranks.world_size, accumulate=options.accumulate, device=ranks.device, num_threads=ranks.num_threads,
    )  # fmt: skip
    renderer = config.loader.renderer
    if renderer == "auto":
        renderer = _chosen_renderer(None if restart else folder, open_loader, config.loader, ranks)
    fingerprints = mined.fingerprints if mined else {}
    identity = RunIdentity(
        method=method, config=config, index=index.fingerprint, mined=fingerprints, renderer=renderer, num_steps=num_steps
    )
    if ranks.device.type == "cpu":
        torch.set_num_threads(ranks.num_threads)  # sums depend on it: the cores decide, not what ran before, nor torchrun's single thread
    train_step = TrainStep(method, config, ranks=ranks)
    first_step = 0 if restart else restore(folder, identity, method=train_step.method, optimizer=train_step.optimizer)
    require_same(_start(identity, train_step, first_step), ranks)
    last_step = num_steps if max_steps is None else min(max_steps, num_steps)
    if first_step >= last_step:
        return Outcome(first_step=first_step, step=first_step, num_steps=num_steps)
    train_step.connect()

    with contextlib.ExitStack() as stack:
        loader_config = config.loader.model_copy(update={"renderer": renderer})
        loader = stack.enter_context(open_loader(loader=loader_config, start_step=first_step, num_steps=last_step - first_step))
        metrics: MetricsLog | None = None
        advance: Callable[..., None] = _silent
        if ranks.is_main:
            require_checkpoint_space(folder, method=train_step.method)
            _prepare_folder(folder, config, restart=restart)
            stack.enter_context(log_to_file(folder / "train.log"))
            _announce(identity, first_step=first_step, num_images=len(index), ranks=ranks)
            metrics = stack.enter_context(contextlib.closing(MetricsLog(folder, step=first_step)))
            total, done = num_steps * options.batch_size, first_step * options.batch_size
            advance = stack.enter_context(progress(f"train {method}", total=total, unit="images", done=done))
        stop = stack.enter_context(_stop_signals())
        agreement, meter, clock = Agreement(ranks, num_requests=2), Meter(ranks), _SaveClock(options.checkpoint_every_min, ranks)
        batches = on_device(loader, ranks.device, clock=meter.clock)
        note: str | None = None

        for step in range(first_step, last_step):
            lr = learning_rate(step, config, steps_per_epoch=steps_per_epoch)
            logged = train_step(batches, step=step, num_steps=num_steps, lr=lr, meter=meter)

            done = step + 1
            epoch, within = divmod(done, steps_per_epoch)
            stopping, due = agreement.any(bool(stop), clock.is_due())
            saving = stopping or due or done == last_step or (not within and epoch % options.checkpoint_every_epochs == 0)
            keeping = not within and options.keep_every_epochs > 0 and epoch % options.keep_every_epochs == 0
            if saving or keeping or done % options.log_every_steps == 0:
                record = meter.read()
                if metrics is not None:
                    metrics.write({"step": done, "epoch": done / steps_per_epoch, **record, **logged})
                    note = _note(record)
            advance(options.batch_size, note=note)
            if saving or keeping:
                _require_finite(train_step, ranks, step_done=done)
                state = partial(save, identity=identity, method=train_step.method, optimizer=train_step.optimizer, step=done)
                if ranks.is_main and saving:
                    save_latest(folder, state)
                if ranks.is_main and keeping:
                    state(folder / f"epoch-{epoch:04d}.pt")
                clock.restart()
                meter.restart()  # saving is neither training nor waiting for data
            if stopping and done < last_step:
                return Outcome(first_step=first_step, step=done, num_steps=num_steps, signum=stop[0] if stop else signal.SIGTERM)
    return Outcome(first_step=first_step, step=last_step, num_steps=num_steps)


def _check_size(config: Config, index: ShardIndex, ranks: Ranks) -> None:
    smallest = 2 * ranks.world_size * config.train.accumulate
    if len(index) < smallest:
        raise ConfigError(
            f"{index.path}: {len(index)} images; training needs {smallest} or more, two for each of {ranks.world_size} ranks × "
            f"{config.train.accumulate} micro-batches (batch norm); pack more images"
        )


def _chosen_renderer(folder: Path | None, open_loader: Callable[..., ViewLoader], loader: LoaderConfig, ranks: Ranks) -> RendererName:
    """What "auto" stands for: decided by the first rank, for all, once for the run in `folder`."""
    kind = "cpu"
    if ranks.is_main:
        earlier = earlier_run(folder) if folder else None
        if earlier is not None:
            kind = earlier["renderer"]
        elif ranks.device.type == "cuda":
            with open_loader(loader=loader, num_steps=0) as trial:
                kind = trial.renderer_kind
    kind = broadcast_value(kind, ranks)
    if kind == "gpu" and ranks.device.type != "cuda":
        raise StaleError(
            f"{folder}: its views are rendered on a GPU, and there is none here; resume it on a machine with a CUDA GPU, or start from "
            "scratch with --restart, or use another folder with --out"
        )
    return cast(RendererName, kind)


def _start(identity: RunIdentity, step: TrainStep, first_step: int) -> dict[str, Any]:
    """What all ranks must have in common."""
    return {
        "the step to start from": first_step,
        "the method": identity.method,
        "the recipe": digest(config_to_dict(identity.config)),
        "the shards": identity.index,
        "the mined tables": digest(dict(identity.mined)),
        "the renderer": identity.renderer,
        "the weights to start from": weights_digest(step.method),
    }


def _require_finite(step: TrainStep, ranks: Ranks, *, step_done: int) -> None:
    """Raise, on all ranks, before a state that is not finite would be saved."""
    state = {"model": step.method.state_dict(), "optimizer": step.optimizer.state_dict()["state"]}
    broken = mean_over_ranks(torch.tensor(0.0 if is_finite(state) else 1.0), ranks)
    if broken > 0:
        raise DataError(
            f"weights or momenta are not finite after step {step_done}, so training stops; the last checkpoints are kept. "
            "Try a lower optim.lr_per_256, a longer optim.warmup_epochs, or train.precision=fp32, with --restart"
        )


class _SaveClock:
    """When the first rank requests a checkpoint because time has passed; each request is made once."""

    def __init__(self, every_min: float, ranks: Ranks) -> None:
        self._every_s = every_min * 60 if ranks.is_main and every_min else math.inf
        self.restart()

    def restart(self) -> None:
        self._next_s = time.monotonic() + self._every_s

    def is_due(self) -> bool:
        if time.monotonic() < self._next_s:
            return False
        self._next_s = math.inf
        return True


def _prepare_folder(folder: Path, config: Config, *, restart: bool) -> None:
    """Make the run folder and write the recipe; with `restart`, remove an earlier run's results, and nothing else."""
    remove_leftovers(folder)
    if restart:
        for path in (*(folder / name for name in (CHECKPOINT, PREVIOUS, "metrics.jsonl", "train.log")), *folder.glob("epoch-*.pt")):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with atomic_file(folder / "recipe.toml") as file:
        file.write(config_to_toml(config).encode())


def _announce(identity: RunIdentity, *, first_step: int, num_images: int, ranks: Ranks) -> None:
    config = identity.config
    where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    many = f"{ranks.world_size} × " if ranks.world_size > 1 else ""
    log.info(
        "%s: %s, %d images, %d epochs = %d steps of %d images, on %s%s; views by the %s renderer",
        identity.method, config.model.backbone, num_images, config.train.epochs, identity.num_steps, config.train.batch_size, many, where,
        identity.renderer,
    )  # fmt: skip
    if first_step:
        log.info("resuming from step %d of %d", first_step, identity.num_steps)
    if config.optim.warmup_epochs >= config.train.epochs:
        log.warning(
            "the learning rate warms up over %g epochs, the run has %d: it never reaches its peak (optim.warmup_epochs)",
            config.optim.warmup_epochs, config.train.epochs,
        )  # fmt: skip


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append themselves to; a second signal acts as before and exits immediately."""
    received: list[int] = []

    def receive(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])
        log.warning("%s: finishing the step and saving; a second signal exits immediately", signal.Signals(signum).name)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _note(record: Mapping[str, float]) -> str:
    return f"loss {record['loss']:.3f}, {record['images_per_s']:.1f} images/s, {record['data_wait']:.0%} waiting for data"


def _silent(_count: int = 1, note: str | None = None) -> None:
    """Ranks other than the first show no progress."""
