"""Training within an evaluation: steps that resume exactly where a killed process left off, on one rank or many."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from orl_fast.checkpoint import read_state, readable_checkpoints, save_latest
from orl_fast.console import log, log_to_file, progress
from orl_fast.distributed import Agreement, mean_over_ranks, require_same
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.files import atomic_file, locked
from orl_fast.signals import stop_signals

_SAVE_EVERY_S = 600.0
_LOG_EVERY_STEPS = 50
_METRICS = "metrics.jsonl"  # a line every 50 steps: "step" and the values


class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Condition:
    """What a saved training depends on besides the evaluation's options: with another value it is not resumed."""

    def __init__(self, what: str, value: str) -> None:
        self._what, self._value = what, value

    def state_dict(self) -> dict[str, str]:
        return {"value": self._value}

    def load_state_dict(self, state: Any, /) -> None:
        if state["value"] != self._value:
            raise ValueError(f"it was begun with {self._what} {state['value']}, now {self._value}")


class Training:
    """A training of `num_steps` steps whose whole state is the step number and `parts` (modules and optimizers by name).

    Opening it loads the parts as they were saved in `context.work`, if they were: `first_step` is the number of steps done. Rank 0 holds
    the folder's lock meanwhile. Learning rates and data have to be functions of the step.
    """

    def __init__(self, parts: Mapping[str, Stateful], *, num_steps: int, context: Context, save_every_s: float = _SAVE_EVERY_S) -> None:
        self._parts, self.num_steps, self._context, self._save_every_s = parts, num_steps, context, save_every_s
        self._folder = context.work
        self.first_step = 0

    @classmethod
    @contextmanager
    def open(
        cls, parts: Mapping[str, Stateful], *, num_steps: int, context: Context, save_every_s: float = _SAVE_EVERY_S
    ) -> Iterator["Training"]:
        """DataError: both saved states are damaged, or another process trains in this folder; ConfigError: ranks begin differently."""
        if context.device.type == "cpu":
            torch.set_num_threads(context.ranks.num_threads)  # sums depend on it: the cores decide, not what ran before
        training = cls(parts, num_steps=num_steps, context=context, save_every_s=save_every_s)
        with ExitStack() as stack:
            folder = context.work
            if folder is not None and context.ranks.is_main:
                stack.enter_context(locked(folder, what="orl-fast eval"))
                stack.enter_context(log_to_file(folder / "train.log"))
            if folder is not None:
                training._restore(folder)
            require_same({"the step to start from": training.first_step}, context.ranks)
            yield training

    def run(self, step: Callable[[int], Mapping[str, Tensor]], *, what: str, images_per_step: int) -> None:
        """Call `step` with each step number, from 0, that is left; it returns scalar values to show, "loss" among them.

        Saves every ten minutes, at the end, and on SIGINT or SIGTERM, after which it raises KeyboardInterrupt. DataError as soon as a saved
        state would hold a loss that is not finite.
        """
        ranks = self._context.ranks
        if self.first_step:
            log.info("%s: resuming from step %d of %d", what, self.first_step, self.num_steps)
        total, done = self.num_steps * images_per_step, self.first_step * images_per_step
        with ExitStack() as stack:
            advance: Callable[..., None] = lambda *_args, **_kwargs: None  # noqa: E731
            if ranks.is_main:
                advance = stack.enter_context(progress(what, total=total, unit="images", done=done))
            stop = stack.enter_context(stop_signals())
            agreement = Agreement(ranks, num_requests=2)
            save_at_s = time.monotonic() + self._save_every_s
            note: str | None = None
            for number in range(self.first_step, self.num_steps):
                values = step(number)
                finished = number + 1
                late = ranks.is_main and time.monotonic() >= save_at_s
                save_at_s = math.inf if late else save_at_s
                stopping, due = agreement.any(bool(stop), late)
                saving = stopping or due or finished == self.num_steps
                if saving or finished % _LOG_EVERY_STEPS == 0:
                    shown = {name: mean_over_ranks(value.detach().float().clone(), ranks).item() for name, value in values.items()}
                    if not all(map(math.isfinite, shown.values())):
                        raise DataError(f"{what}: {shown} at step {number}, not finite, so training stops; the last saved state is kept")
                    note = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                    self._write({"step": finished, **shown})
                advance(images_per_step, note=note)
                if saving:
                    self._save(finished)
                    save_at_s = time.monotonic() + self._save_every_s
                if stopping and finished < self.num_steps:
                    raise KeyboardInterrupt

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._folder is not None and self._context.ranks.is_main:
            with (self._folder / _METRICS).open("a") as lines:
                lines.write(json.dumps(record) + "\n")

    def _save(self, step: int) -> None:
        if self._folder is None or not self._context.ranks.is_main:
            return
        state = {"step": step, "parts": {name: part.state_dict() for name, part in self._parts.items()}}

        def write(path: Path) -> None:
            with atomic_file(path) as file:
                torch.save(state, file)

        save_latest(self._folder, write)

    def _restore(self, folder: Path) -> None:
        for values, path in readable_checkpoints(folder, read_state):
            try:
                for name, part in self._parts.items():
                    part.load_state_dict(values["parts"][name])
                self.first_step = int(values["step"])
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: does not fit this evaluation ({str(error).splitlines()[0]}); remove {folder}") from error
            metrics = folder / _METRICS
            if self._context.ranks.is_main and metrics.is_file():  # steps after the saved one are done again
                lines = metrics.read_text().splitlines(keepends=True)
                metrics.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.first_step))
            return
