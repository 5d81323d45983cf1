"""The paper's experiments as a list of commands: BYOL, mining, ORL, and the evaluations of Tables 1 to 4, on COCO.

Each step is one call of the command line, which resumes its own work; a step that ended well is recorded and not repeated.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from orl_fast.console import human_time, log
from orl_fast.errors import DataError, OrlFastError
from orl_fast.files import human_bytes, require_free_space, write_json
from orl_fast.shards.images import IMAGE_SUFFIXES

_CHECKPOINT_BYTES = 1_100_000_000  # of ORL with a ResNet-50: weights, target network and momenta
_ROI_FEATURE_BYTES, _ROIS_PER_IMAGE = 2 * 2048, 50  # float16; RoIs of a COCO photograph
_EPOCHS, _VIEWS_OF_ORL = 800, 1.37  # cost of an ORL step in BYOL steps (paper, section 4.1)
_PER_S, _PHOTOGRAPHS_PER_S = 1000, 20  # in which times are announced: of views of 224 px, and of whole photographs in detection


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """Where the real data is; None: what needs it is left out."""

    coco: Path
    voc: Path | None = None
    imagenet: Path | None = None
    lists: Path | None = None  # of ImageNet's 1 % and 10 %: 1percent.txt, 10percent.txt
    places: Path | None = None
    inat: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command. `num_images` and `num_bytes`: images to pass through a network, and disk taken at most, both estimates."""

    name: str
    arguments: tuple[str, ...]  # of orl-fast
    distributed: bool = False
    num_images: float = 0
    per_s: int = _PER_S
    num_bytes: int = 0
    needed: bool = False  # what follows builds on it


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a rehearsal makes smaller: more arguments of the commands, by verb or evaluation."""

    more: dict[str, tuple[str, ...]] = field(default_factory=dict)
    num_epochs: int = _EPOCHS

    def of(self, name: str) -> tuple[str, ...]:
        return self.more.get(name, ())


REHEARSAL = Scale(
    more={
        "shard": ("--shard-size", "16"),
        "train": ("--recipe", "demo", "--set", "train.epochs=1"),
        "voc07": ("--fast", "--size", "64"),
        "linear": ("--epochs", "1", "--batch-size", "16", "--size", "64"),
        "semi": ("--epochs", "1", "--batch-size", "4", "--size", "64"),
        "detect": (
            *("--schedule", "4", "--batch-size", "4", "--train-sizes", "96", "--test-size", "96", "--max-size", "160"),
            *("--width", "32", "--rois-per-image", "32"),
        ),
    },
    num_epochs=1,
)


def plan(data: DataSets, out: Path, *, scale: Scale) -> list[Step]:
    """All steps, in order. DataError if a data set is not where it is said to be."""
    for name, path in vars(data).items():
        if path is not None and not path.exists():
            raise DataError(f"{path}: there is no such folder (--{name}); name the data set's folder, or leave the option out")
    num_images, num_bytes = _images_below(data.coco / "train2017")
    if not num_images:
        raise DataError(f"{data.coco}: train2017/ holds no images; give the folder with train2017, val2017 and annotations")
    shards, runs = out / "shards" / "coco", out / "runs" / "coco"
    byol, orl = runs / "byol", runs / "orl"
    trained: dict[str, Any] = {"distributed": True, "needed": True, "num_bytes": 3 * _CHECKPOINT_BYTES}
    epochs = scale.num_epochs * num_images
    steps = [
        Step(name="shard", arguments=("shard", str(data.coco), "--out", str(shards), *scale.of("shard")), num_bytes=num_bytes, needed=True),
        Step(name="byol", arguments=("train", str(shards), "--method", "byol", "--out", str(byol), *scale.of("train")), num_images=epochs,
             **trained),
        Step(name="mine", arguments=("mine", str(shards), "--checkpoint", str(byol), *scale.of("mine")), distributed=True, needed=True,
             num_images=num_images * (1 + _ROIS_PER_IMAGE), num_bytes=num_images * _ROIS_PER_IMAGE * _ROI_FEATURE_BYTES),
        Step(name="orl", arguments=("train", str(shards), "--method", "orl", "--out", str(orl), *scale.of("train")),
             num_images=_VIEWS_OF_ORL * epochs, **trained),
        Step(name="corloc", arguments=("eval", "corloc", str(byol), str(shards), *scale.of("corloc"))),
    ]  # fmt: skip
    for run in (orl, byol):
        steps += _evaluations(run, data, out, scale)
    return [
        *steps,
        Step(name="results", arguments=("results", str(out / "runs"), "--format", "markdown", "--out", str(out / "results.md"))),
    ]


def missing(data: DataSets) -> list[str]:
    """What is left out, in words."""
    left_out = {
        "voc": "VOC07 SVM and low-shot (Tables 1 and 2)", "imagenet": "ImageNet linear and semi-supervised", "places": "Places205 linear",
        "inat": "iNaturalist18 linear",
    }  # fmt: skip
    found = [f"{what}: no --{name}" for name, what in left_out.items() if getattr(data, name) is None]
    return found + (["ImageNet 1 % and 10 %: no --lists"] if data.imagenet is not None and data.lists is None else [])


def announce(steps: Sequence[Step], out: Path) -> list[str]:
    """One line for each step: images, time at a rate to scale it by, disk. DataError if the disk has too little room."""
    lines = []
    for step in steps:
        work = ""
        if step.num_images:
            work = f"{step.num_images:,.0f} images, {human_time(step.num_images / step.per_s)} at {step.per_s:,} images/s"
        disk = f"{human_bytes(step.num_bytes)} on disk" if step.num_bytes else ""
        lines.append(f"{step.name}: {', '.join(filter(None, (work, disk))) or 'minutes'}")
    left = [step for step in steps if not is_done(step, out)]
    require_free_space(out, num_bytes=sum(step.num_bytes for step in left), purpose="what is left to do")
    lines.append(f"together {human_bytes(sum(step.num_bytes for step in left))} on disk")
    return lines


def is_done(step: Step, out: Path) -> bool:
    """Whether it ended well, with these arguments."""
    try:
        return bool(json.loads(_record(step, out).read_bytes())["arguments"] == list(step.arguments))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_steps(steps: Sequence[Step], out: Path, *, num_processes: int = 1, device: str = "auto") -> list[str]:
    """Run what is not done yet; returns the names of the evaluations that failed, whose output says why.

    Raises StepFailed where a step fails that others build on, KeyboardInterrupt where one was interrupted.
    """
    failed = []
    for number, step in enumerate(steps, start=1):
        if is_done(step, out):
            log.info("step %d of %d, %s: done before", number, len(steps), step.name)
            continue
        arguments = step.arguments + (("--device", device) if step.arguments[0] in ("train", "mine", "eval") else ())
        command = [sys.executable, "-m", "orl_fast", *arguments]
        if step.distributed and num_processes > 1:
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes))
            command = [sys.executable, *torchrun, "-m", "orl_fast", *arguments]
        log.info("step %d of %d, %s: orl-fast %s", number, len(steps), step.name, shlex.join(arguments))
        start_s = time.monotonic()
        code, stopping = _run(command)
        if code and (stopping or code in (130, 143, -signal.SIGINT, -signal.SIGTERM)):
            raise KeyboardInterrupt
        if code and step.needed:
            raise StepFailed(f"{step.name} failed (exit code {code}), and what follows builds on it; see above, then run the same command")
        if code:
            log.warning("%s failed (exit code %d); the other steps go on", step.name, code)
            failed.append(step.name)
            continue
        took_s = time.monotonic() - start_s
        log.info("%s: done in %s", step.name, human_time(took_s))
        write_json(_record(step, out), {"arguments": list(step.arguments), "seconds": round(took_s, 1), "processes": num_processes})
        if stopping:
            raise KeyboardInterrupt
    return failed


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """Run a command to its end: its exit code, and whether a signal asked to stop, which is left to the command, since it saves first.

    A terminal sends SIGINT to the command too; SIGTERM, which a scheduler sends to one process, is passed on.
    """
    received: list[int] = []
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:

        def receive(signum: int, _frame: FrameType | None) -> None:
            received.append(signum)
            if signum == signal.SIGTERM:
                process.send_signal(signum)

        before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            return process.wait(), bool(received)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


class StepFailed(OrlFastError):
    """A command ended with an error, which it has explained itself."""


def _evaluations(run: Path, data: DataSets, out: Path, scale: Scale) -> list[Step]:
    def step(name: str, evaluation: str, source: Path, *options: str, **costs: Any) -> Step:
        arguments = ("eval", evaluation, str(run), str(source), *options, *scale.of(evaluation))
        return Step(name=f"{name}-{run.name}", arguments=arguments, distributed=evaluation in ("linear", "semi", "detect"), **costs)

    packed = {name: ("--shards", str(out / "shards" / name)) for name in ("imagenet", "places", "inat")}
    steps = [step("detect", "detect", data.coco, num_images=90_000 * 16, per_s=_PHOTOGRAPHS_PER_S)]
    if data.voc is not None:
        steps = [step("voc07", "voc07", data.voc, num_images=9_963), step("low-shot", "voc07", data.voc, "--low-shot"), *steps]
    for name, dataset, epochs in (("imagenet", "imagenet", 28), ("places", "places205", 14), ("inat", "inat18", 84)):
        source: Path | None = getattr(data, name)
        if source is not None:
            num_images, num_bytes = _images_below(source)
            options = ("--dataset", dataset, *packed[name])
            steps.append(step(f"linear-{name}", "linear", source, *options, num_images=epochs * num_images, num_bytes=num_bytes))
    if data.imagenet is not None and data.lists is not None:
        for percent in (1, 10):
            options = ("--list", str(listed := data.lists / f"{percent}percent.txt"), *packed["imagenet"])
            if not listed.is_file():
                raise DataError(f"{listed}: there is no such list; get SimCLR's, or leave --lists out")
            steps.append(step(f"semi-{percent}", "semi", data.imagenet, *options, num_images=20 * len(listed.read_bytes().splitlines())))
    return steps


def _record(step: Step, out: Path) -> Path:
    return out / "steps" / f"{step.name}.json"


def _images_below(root: Path) -> tuple[int, int]:
    """The number of image files and their bytes, by name and size alone."""
    num_images = num_bytes = 0
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                num_images += 1
                num_bytes += os.stat(os.path.join(folder, name)).st_size
    return num_images, num_bytes
