"""Views without images, for tests of the step alone; and a process that runs one rank."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orl_fast.config import Config, load_config
from orl_fast.train.distributed import process_group
from orl_fast.train.metrics import Meter
from orl_fast.train.step import TrainStep
from orl_fast.views.loader import Views

SMALL = [
    "backbone=shufflenet_v2_x0_5",
    "projector_hidden=24",
    "projector_out=16",
    "predictor_hidden=24",
    "image_size_px=48",
    "patch_size_px=32",
]


def small_config(*overrides: str) -> Config:
    return load_config(overrides=[*SMALL, *overrides])


def synthetic_views(step: int, batch: int, *, sizes_px: tuple[int, int] = (48, 32)) -> Views:
    """The same views for a step in every process."""
    generator = torch.Generator().manual_seed(step)

    def pair(size_px: int) -> tuple[Tensor, Tensor]:
        # Noise on a color of its own, so that samples differ after the global pool too.
        base = torch.randint(0, 200, (2, batch, 3, 1, 1), generator=generator)
        noise = torch.randint(0, 56, (2, batch, 3, size_px, size_px), generator=generator)
        first, second = (base + noise).to(torch.uint8)
        return first.to(memory_format=torch.channels_last), second.to(memory_format=torch.channels_last)

    image, patch = sizes_px
    return Views(image=pair(image), intra=pair(patch), inter=pair(patch), rows=np.arange(batch), num_skipped=0)


def part_of(views: Views, start: int, stop: int) -> Views:
    def cut(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if pair is None else (pair[0][start:stop], pair[1][start:stop])

    return Views(image=cut(views.image), intra=cut(views.intra), inter=cut(views.inter), rows=views.rows[start:stop], num_skipped=0)


def run_steps(method: str, config: Config, *, num_steps: int, save_to: Path) -> None:
    """Train a few steps in this process's rank, saving what came out; micro-batch m of rank r takes part m * world_size + r."""
    with process_group("cpu") as ranks:
        train_step = TrainStep(method, config, ranks=ranks)
        # In float64, so that ranks differ from one process by their arithmetic's order only, and not by what training makes of it.
        train_step.method.double()
        for branch in (train_step.method.online, train_step.method.target):
            branch.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
        train_step.connect()
        meter = Meter(ranks)
        for step in range(num_steps):
            views, size = synthetic_views(step, config.train.batch_size), train_step.micro_batch
            parts = [micro * ranks.world_size + ranks.rank for micro in range(config.train.accumulate)]
            batches = iter([part_of(views, part * size, (part + 1) * size) for part in parts])
            train_step(batches, step=step, rate=0.05, momentum=0.9, meter=meter)
        record = meter.read()
        torch.save({"state": train_step.method.state_dict(), "loss": record["loss"]}, save_to / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = json.loads(sys.argv[1])
    run_steps(
        arguments["method"], small_config(*arguments["overrides"]), num_steps=arguments["num_steps"], save_to=Path(os.environ["SAVE_TO"])
    )
