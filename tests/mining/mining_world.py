"""A small data set and a checkpoint to mine from: synthetic scenes, so that no photographs are needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orl_fast.checkpoint import write_checkpoint
from orl_fast.config import Config, MiningConfig, ModelConfig
from orl_fast.mining.pipeline import STEPS, Stage
from orl_fast.models import Network
from orl_fast.recipe import config_to_dict
from orl_fast.shards import ShardIndex

NUM_IMAGES, SHARD_SIZE = 22, 8
ALL = (*STEPS, "patches")
CONFIG = Config(
    model=ModelConfig(backbone="resnet10_small", projector_hidden=16, projector_out=12, predictor_hidden=16),
    mining=MiningConfig(
        resize_px=40, crop_px=32, num_neighbors=3, min_side_px=16, max_rois=12, roi_size_px=32, pair_ratio=0.3, encode_batch=16
    ),
)


@dataclass(frozen=True, kw_only=True)
class World:
    folder: Path
    images: Path
    shards: Path
    checkpoint: Path
    config: Config

    @property
    def index(self) -> ShardIndex:
        return ShardIndex.open(self.shards)


def draw_scene(seed: int) -> Image.Image:
    """A few colored rectangles on a gray ground; every fifth scene is a copy of the one before."""
    rng = np.random.default_rng(seed - 1 if seed % 5 == 4 else seed)
    height, width = int(rng.integers(60, 110)), int(rng.integers(60, 110))
    pixels = np.full((height, width, 3), 128, np.uint8)
    for _ in range(7):
        x, y = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
        pixels[y : y + int(rng.integers(18, 50)), x : x + int(rng.integers(18, 50))] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def save_checkpoint(path: Path, config: Config, *, seed: int = 0, step: int = 3, num_steps: int = 3) -> Path:
    torch.manual_seed(seed)
    network = Network(config.model.backbone, (config.model.projector_hidden, config.model.projector_out)).train()
    with torch.no_grad():
        network(torch.randn(32, 3, 32, 32))  # moves the running statistics
    header = {
        "method": "byol", "step": step, "num_steps": num_steps, "config": config_to_dict(config), "index": "any", "mined": {},
        "renderer": "cpu", "versions": {"torch": "x"}, "encoder": {**network.description, "prefix": "online."},
    }  # fmt: skip
    write_checkpoint(path, header, model={f"online.{key}": value for key, value in network.state_dict().items()}, optimizer={})
    return path


def mine(world: World, folder: Path, steps: Sequence[str] = STEPS, *, config: Config = CONFIG, **options: Any) -> Stage:
    stage = Stage(index=world.index, folder=folder, config=config, **{"checkpoint": world.checkpoint, **options})
    stage.run(steps)
    return stage


def with_mining(**changes: Any) -> Config:
    return CONFIG.model_copy(update={"mining": CONFIG.mining.model_copy(update=changes)})


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every table below a folder, by file name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("mine.log", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
