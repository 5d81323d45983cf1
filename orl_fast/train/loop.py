"""The training loop: batches in, checkpoints and metrics out."""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from orl_fast.checkpoint import CHECKPOINT, FOLLOWING, PREVIOUS, earlier_run, save_latest, write_checkpoint
from orl_fast.config import Config, LoaderConfig, RendererName, digest
from orl_fast.console import log, log_to_file, progress
from orl_fast.distributed import Agreement, Ranks, broadcast_value, mean_over_ranks, require_same
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.files import atomic_file, locked, remove_leftovers, require_free_space
from orl_fast.methods import METHODS, Method
from orl_fast.models.encoder import is_finite, weights_digest
from orl_fast.recipe import config_to_toml
from orl_fast.shards import ShardIndex
from orl_fast.signals import stop_signals
from orl_fast.train.metrics import Meter, MetricsLog, waiting_note
from orl_fast.train.run import RECIPE, Run, restore, run_header
from orl_fast.train.step import TrainStep, learning_rate
from orl_fast.views.loader import ViewLoader
from orl_fast.views.pixels import images_identity
from orl_fast.views.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    first_step: int  # steps done before this call
    step: int  # steps done in all, of `num_steps`
    num_steps: int
    signum: int = 0  # of the signal that stopped it; 0: none did


def train(run: Run, *, index: ShardIndex, ranks: Ranks, restart: bool = False, max_steps: int | None = None) -> Outcome:
    """Train from scratch, or resume where an earlier call was stopped. SIGINT and SIGTERM finish the step and save.

    The run folder gets checkpoint.pt and the one before, metrics.jsonl, tensorboard/, train.log and recipe.toml; `restart` discards what it
    holds of an earlier run. After `max_steps` in all, training stops and saves; another call resumes.

    Raises:
        ConfigError: the batch does not fit the ranks or the data, or ranks differ. StaleError: the folder holds another run.
        DataError: damaged checkpoints, a full disk, another process in this folder, or weights or losses that are not finite.
    """
    config, options, folder = run.config, run.config.train, run.folder
    _check_size(config, index, ranks)
    with contextlib.ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(locked(folder, what="orl-fast train"))
        parts = {"world_size": ranks.world_size, "accumulate": options.accumulate}
        sampler = Sampler(num_images=len(index), batch_size=options.batch_size, seed=options.seed, **parts)
        steps_per_epoch, num_steps = sampler.steps_per_epoch, options.epochs * sampler.steps_per_epoch
        open_loader = partial(
            ViewLoader.open, index, METHODS[run.method].views(config), batch_size=options.batch_size, seed=options.seed, mined=run.mined,
            rank=ranks.rank, world_size=ranks.world_size, accumulate=options.accumulate, device=ranks.device, num_threads=ranks.num_threads,
        )  # fmt: skip
        renderer = config.loader.renderer
        if renderer == "auto":
            renderer = _chosen_renderer(None if restart else folder, open_loader, config.loader, ranks)
        if ranks.device.type == "cpu":
            torch.set_num_threads(ranks.num_threads)  # sums depend on it: the cores decide, not what ran before, nor torchrun's one thread
        train_step = TrainStep(run.method, config, ranks=ranks)
        header = run_header(run, train_step.method, index=images_identity(index, config.loader), renderer=renderer, num_steps=num_steps)
        first_step = 0 if restart else restore(folder, header, method=train_step.method, optimizer=train_step.optimizer)
        _require_same_start(header, train_step.method, first_step, ranks)
        last_step = num_steps if max_steps is None else min(max_steps, num_steps)
        if first_step >= last_step:
            return Outcome(first_step=first_step, step=first_step, num_steps=num_steps)
        train_step.connect()

        loader_config = config.loader.model_copy(update={"renderer": renderer})
        loader = stack.enter_context(open_loader(loader=loader_config, start_step=first_step, num_steps=last_step - first_step))
        metrics: MetricsLog | None = None
        advance: Callable[..., None] = _silent
        if ranks.is_main:
            _require_checkpoint_space(folder, train_step.method)
            _prepare_folder(run, restart=restart)
            stack.enter_context(log_to_file(folder / "train.log"))
            _announce(header, config, first_step=first_step, num_images=len(index), ranks=ranks)
            metrics = stack.enter_context(contextlib.closing(MetricsLog(folder, step=first_step)))
            total, done = num_steps * options.batch_size, first_step * options.batch_size
            advance = stack.enter_context(progress(f"train {run.method}", total=total, unit="images", done=done))
        stop = stack.enter_context(stop_signals())
        agreement, meter = Agreement(ranks, num_requests=2), Meter(ranks)
        batches = meter.feed(loader)
        save_every_s = options.checkpoint_every_min * 60 if ranks.is_main and options.checkpoint_every_min else math.inf
        save_at_s = time.monotonic() + save_every_s
        note: str | None = None

        for step in range(first_step, last_step):
            lr = learning_rate(step, config, steps_per_epoch=steps_per_epoch)
            logged = train_step(batches, step=step, num_steps=num_steps, lr=lr, meter=meter)

            done = step + 1
            epoch, within = divmod(done, steps_per_epoch)
            is_late = time.monotonic() >= save_at_s
            if is_late:
                save_at_s = math.inf  # requested once
            stopping, due = agreement.any(bool(stop), is_late)
            saving = stopping or due or done == last_step or (not within and epoch % options.checkpoint_every_epochs == 0)
            keeping = not within and options.keep_every_epochs > 0 and epoch % options.keep_every_epochs == 0
            if saving or keeping or done % options.log_every_steps == 0:
                record = meter.read()
                if metrics is not None:
                    metrics.write({"step": done, "epoch": done / steps_per_epoch, **record, **logged})
                    waiting = waiting_note(record)
                    note = f"loss {record['loss']:.3f}, {record['images_per_s']:.1f} images/s, {waiting}"
            advance(options.batch_size, note=note)
            if saving or keeping:
                state = {"model": train_step.method.state_dict(), "optimizer": train_step.optimizer.state_dict()}
                _require_finite(state, ranks, step_done=done)
                write = partial(write_checkpoint, header={**header, "step": done}, model=state["model"], optimizer=state["optimizer"])
                if ranks.is_main and saving:
                    save_latest(folder, write)
                if ranks.is_main and keeping:
                    write(folder / f"epoch-{epoch:04d}.pt")
                save_at_s = time.monotonic() + save_every_s
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


def _require_same_start(header: Mapping[str, Any], method: Method, first_step: int, ranks: Ranks) -> None:
    common = {
        "the step to start from": first_step,
        "the method": header["method"],
        "the recipe": digest(header["config"]),
        "the shards": header["index"],
        "the mined tables": digest(header["mined"]),
        "the renderer": header["renderer"],
        "the weights to start from": weights_digest(method),
    }
    require_same(common, ranks)


def _require_finite(state: Mapping[str, Any], ranks: Ranks, *, step_done: int) -> None:
    """Raise, on all ranks, before a state that is not finite would be saved."""
    broken = mean_over_ranks(torch.tensor(0.0 if is_finite(state) else 1.0), ranks)
    if broken > 0:
        raise DataError(
            f"weights or momenta are not finite after step {step_done}, so training stops; the last checkpoints are kept. "
            "Try a lower optim.lr_per_256, a longer optim.warmup_epochs, or train.precision=fp32, with --restart"
        )


def _prepare_folder(run: Run, *, restart: bool) -> None:
    """Make the run folder and write the recipe; with `restart`, remove an earlier run's results, and nothing else."""
    folder = run.folder
    remove_leftovers(folder)
    if restart:
        for path in (*(folder / name for name in (CHECKPOINT, PREVIOUS, "metrics.jsonl", "train.log")), *folder.glob("epoch-*.pt")):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with atomic_file(folder / RECIPE) as file:
        file.write(config_to_toml(run.config).encode())


def _require_checkpoint_space(folder: Path, method: Method) -> None:
    """DataError if a run's checkpoints will not fit: the last two stay until a third is whole."""
    state = sum(value.nbytes for value in method.state_dict().values())
    momenta = sum(value.nbytes for value in method.parameters() if value.requires_grad)
    files = [folder / name for name in (CHECKPOINT, PREVIOUS, FOLLOWING)]
    there = sum(file.stat().st_size for file in files if file.exists())
    require_free_space(folder, num_bytes=max(0, 3 * (state + momenta) - there), purpose="three checkpoints (two kept, one being written)")


def _announce(header: Mapping[str, Any], config: Config, *, first_step: int, num_images: int, ranks: Ranks) -> None:
    where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    many = f"{ranks.world_size} × " if ranks.world_size > 1 else ""
    log.info(
        "%s: %s, %d images, %d epochs = %d steps of %d images, on %s%s; views by the %s renderer",
        header["method"], config.model.backbone, num_images, config.train.epochs, header["num_steps"], config.train.batch_size, many, where,
        header["renderer"],
    )  # fmt: skip
    if first_step:
        log.info("resuming from step %d of %d", first_step, header["num_steps"])
    if config.optim.warmup_epochs >= config.train.epochs:
        log.warning(
            "the learning rate warms up over %g epochs, the run has %d: it never reaches its peak (optim.warmup_epochs)",
            config.optim.warmup_epochs, config.train.epochs,
        )  # fmt: skip


def _silent(_count: int = 1, note: str | None = None) -> None:
    """Ranks other than the first show no progress."""
