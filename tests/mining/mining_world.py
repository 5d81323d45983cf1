"""A small packed folder and a checkpoint to mine from: drawn scenes, so that no photographs are needed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from orl_fast.config import Config, MiningConfig, ModelConfig, config_to_dict
from orl_fast.models import Branch
from orl_fast.models.encoder import CHECKPOINT_FORMAT
from orl_fast.shards import ShardIndex

NUM_IMAGES, SHARD_SIZE = 22, 8
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


def save_checkpoint(path: Path, config: Config, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    branch = Branch(config.model).train()
    with torch.no_grad():
        branch(torch.randn(32, 3, 32, 32))  # moves the running statistics
    values = {
        "format": CHECKPOINT_FORMAT, "method": "byol", "step": 3, "config": config_to_dict(config), "index": "any", "mined": {},
        "model": {f"online.{key}": value for key, value in branch.state_dict().items()}, "optimizer": {}, "versions": {"torch": "x"},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path)
    return path
