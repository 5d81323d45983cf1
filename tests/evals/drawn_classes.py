"""Small labelled images, each of noise on its class's color, in the layouts of real data sets."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from orl_fast.config import Config, ModelConfig
from orl_fast.distributed import Ranks
from orl_fast.evals import Context
from orl_fast.models import Encoder, random_encoder

COLORS = ((190, 60, 60), (60, 190, 60), (60, 60, 190), (170, 170, 50))


def draw_image(path: Path, *, seed: int, color: tuple[int, int, int] = COLORS[0], size_px: tuple[int, int] = (48, 40)) -> None:
    """Noise, the same for a seed, as a file of the kind that the suffix names."""
    noise = np.random.default_rng(seed).normal(0, 50, (size_px[1], size_px[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(path)


def draw_splits(root: Path, classes: Mapping[str, tuple[int, int]]) -> None:
    """train/CLASS/CLASS_0.jpg … and val/CLASS/…, as many as `classes` says for each."""
    seed = 0
    for split in (0, 1):
        for c, (name, counts) in enumerate(classes.items()):
            for i in range(counts[split]):
                draw_image(root / ("train", "val")[split] / name / f"{name}_{i}.jpg", seed=seed, color=COLORS[c % len(COLORS)])
                seed += 1


def small_encoder() -> Encoder:
    return random_encoder(Config(model=ModelConfig(backbone="resnet10_small")))


def context(work: Path | None = None, ranks: Ranks | None = None) -> Context:
    return Context(device=torch.device("cpu"), num_threads=1, work=work, ranks=ranks or Ranks())
