"""The training loop: batches in, checkpoints and metrics out."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from orl_fast.config import Config, config_to_toml
from orl_fast.console import log, log_to_file, progress
from orl_fast.files import atomic_file
from orl_fast.shards import ShardIndex
from orl_fast.train.checkpoint import RunIdentity, require_checkpoint_space, restore_checkpoint, save_checkpoint
from orl_fast.train.distributed import Agreement, Ranks
from orl_fast.train.metrics import Meter, MetricsLog
from orl_fast.train.optim import base_learning_rate
from orl_fast.train.schedules import ema_momentum, learning_rate
from orl_fast.train.stage import CHECKPOINT, Mined
from orl_fast.train.step import TrainStep, micro_batch
from orl_fast.train.upload import on_device
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
    """Train from scratch, or go on where an earlier call was stopped. SIGINT and SIGTERM finish the step and save.

    Args:
        method: a key of `orl_fast.methods.METHODS`.
        folder: the run folder: checkpoint.pt, metrics.jsonl, tensorboard/, train.log, recipe.toml.
        mined: the tables of stage 2, for methods that draw from them.
        restart: forget what the folder holds of an earlier run.
        max_steps: stop, and save, once so many steps are done in all; another call goes on.
    Raises:
        ConfigError: the batch does not fit the ranks or the data. StaleError: the folder holds another run.
        DataError: a damaged checkpoint, a full disk, or a loss that is no longer finite.
    """
    options, checkpoint = config.train, folder / CHECKPOINT
    identity = RunIdentity(method=method, config=config, index=index.fingerprint, mined=mined.fingerprints if mined else {})
    sampler = Sampler(
        num_images=len(index),
        micro_batch=micro_batch(config, ranks),
        world_size=ranks.world_size,
        accumulate=options.accumulate,
        seed=options.seed,
    )
    num_steps = options.epochs * sampler.steps_per_epoch
    if ranks.device.type == "cpu":
        torch.set_num_threads(ranks.num_threads)  # sums depend on it: the cores decide, not what ran before, nor torchrun's single thread
    train_step = TrainStep(method, config, ranks=ranks)
    first_step = 0
    if checkpoint.exists() and not restart:
        first_step = restore_checkpoint(checkpoint, identity, model=train_step.method, optimizer=train_step.optimizer)
    last_step = num_steps if max_steps is None else min(max_steps, num_steps)
    if first_step >= last_step:
        return Outcome(first_step=first_step, step=first_step, num_steps=num_steps)
    train_step.connect()

    with contextlib.ExitStack() as stack:
        metrics: MetricsLog | None = None
        advance: Callable[..., None] = _silent
        if ranks.is_main:
            require_checkpoint_space(folder, model=train_step.method)
            _prepare_folder(folder, config, restart=restart)
            stack.enter_context(log_to_file(folder / "train.log"))
            _announce(identity, num_steps=num_steps, first_step=first_step, num_images=len(index), ranks=ranks)
            metrics = stack.enter_context(contextlib.closing(MetricsLog(folder, step=first_step)))
            total, done = num_steps * options.batch_size, first_step * options.batch_size
            advance = stack.enter_context(progress(f"train {method}", total=total, unit="images", done=done))
        loader = stack.enter_context(
            ViewLoader.open(
                index,
                config=config,
                rois=mined.rois if mined else None,
                pairs=mined.pairs if mined else None,
                patches=mined.patches if mined else None,
                rank=ranks.rank,
                world_size=ranks.world_size,
                device=ranks.device,
                num_threads=ranks.num_threads,
                start_step=first_step,
                num_steps=last_step - first_step,
            )
        )
        stop = stack.enter_context(_stop_signals())
        agreement, meter = Agreement(ranks), Meter(ranks)
        batches = on_device(loader, ranks.device, clock=meter.clock)
        note: str | None = None

        for step in range(first_step, last_step):
            rate = learning_rate(
                step,
                base_lr=base_learning_rate(config),
                steps_per_epoch=sampler.steps_per_epoch,
                num_epochs=options.epochs,
                warmup_epochs=config.optim.warmup_epochs,
                cosine="step" if config.compat == "paper" else config.optim.cosine,
            )
            momentum = ema_momentum(step, num_steps=num_steps, base=config.optim.ema_momentum)
            train_step(batches, step=step, rate=rate, momentum=momentum, meter=meter)

            done = step + 1
            epoch, within = divmod(done, sampler.steps_per_epoch)
            stopping = agreement.any(bool(stop))
            saving = stopping or done == last_step or (not within and epoch % options.checkpoint_every_epochs == 0)
            keeping = not within and options.keep_every_epochs > 0 and epoch % options.keep_every_epochs == 0
            if saving or keeping or done % options.log_every_steps == 0:
                record = meter.read()  # raises before a state that is not finite could be saved
                if metrics is not None:
                    metrics.write({"step": done, "epoch": done / sampler.steps_per_epoch, **record, "lr": rate, "ema_momentum": momentum})
                    note = _note(record)
            advance(options.batch_size, note=note)
            if ranks.is_main:
                for path in [checkpoint] * saving + [folder / f"epoch-{epoch:04d}.pt"] * keeping:
                    save_checkpoint(path, identity, model=train_step.method, optimizer=train_step.optimizer, step=done)
            if saving or keeping:
                meter.restart()  # saving is neither training nor waiting for data
            if stopping and done < last_step:
                return Outcome(first_step=first_step, step=done, num_steps=num_steps, signum=stop[0] if stop else signal.SIGTERM)
    return Outcome(first_step=first_step, step=last_step, num_steps=num_steps)


def _prepare_folder(folder: Path, config: Config, *, restart: bool) -> None:
    """Make the run folder and write the recipe; with `restart`, remove an earlier run's results, and nothing else."""
    if restart:
        for path in (folder / CHECKPOINT, *folder.glob("epoch-*.pt"), folder / "metrics.jsonl", folder / "train.log"):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with atomic_file(folder / "recipe.toml") as file:
        file.write(config_to_toml(config).encode())


def _announce(identity: RunIdentity, *, num_steps: int, first_step: int, num_images: int, ranks: Ranks) -> None:
    config = identity.config
    where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    many = f"{ranks.world_size} × " if ranks.world_size > 1 else ""
    log.info(
        "%s: %s, %d images, %d epochs = %d steps of %d images, on %s%s",
        identity.method, config.model.backbone, num_images, config.train.epochs, num_steps, config.train.batch_size, many, where,
    )  # fmt: skip
    if first_step:
        log.info("going on after step %d of %d", first_step, num_steps)
    if config.optim.warmup_epochs >= config.train.epochs:
        log.warning(
            "the learning rate warms up over %g epochs, the run has %d: it never reaches its peak (optim.warmup_epochs)",
            config.optim.warmup_epochs, config.train.epochs,
        )  # fmt: skip


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append themselves to; the second time they act as before, for those in a hurry."""
    received: list[int] = []

    def receive(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])
        log.warning("%s: finishing the step and saving; once more to stop at once", signal.Signals(signum).name)

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
