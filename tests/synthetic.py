"""Small configurations, and views without images: for tests of methods and of the step alone."""

from dataclasses import replace

import numpy as np
import torch

from orl_fast.config import Config
from orl_fast.methods import METHODS
from orl_fast.recipe import load_config
from orl_fast.views import Batch

SMALL = [
    "backbone=resnet10_small",
    "projector_hidden=24",
    "projector_out=16",
    "predictor_hidden=24",
    "image_size_px=48",
    "patch_size_px=32",
]


def small_config(*overrides: str) -> Config:
    return load_config(overrides=[*SMALL, *overrides])


def synthetic_batch(method: str, config: Config, num_images: int, *, step: int = 0) -> Batch:
    """The method's views of noise, each on a color of its own, so that samples differ after the global pool too.

    The same for a step in every process.
    """
    generator = torch.Generator().manual_seed(step)
    views = {}
    for spec in METHODS[method].views(config):
        base = torch.randint(0, 200, (num_images, 3, 1, 1), generator=generator)
        noise = torch.randint(0, 56, (num_images, 3, spec.size_px, spec.size_px), generator=generator)
        views[spec.name] = (base + noise).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    nothing = np.empty(0, np.int64)
    return Batch(views=views, rows=np.arange(num_images), bad_rows=nothing, bad_sources=nothing)


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    return replace(batch, views={name: view[start:stop] for name, view in batch.views.items()}, rows=batch.rows[start:stop])
