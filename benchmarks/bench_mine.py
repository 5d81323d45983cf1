"""From proposals to pairs: the reference's algorithm against ours, on the same photographs, proposals and network.

The reference takes one query at a time: filter its boxes and those of its ten neighbors in Python, crop and resize with PIL, encode image
by image, compare. So every image is decoded, cropped and encoded about eleven times. Proposals have their own benchmark. Both are
extrapolated to COCO train2017, and the arithmetic stands in the names of the rows.
"""

import itertools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize as unit_length
from torchvision.transforms import functional

from benchmarks.bench_filter import reference_filter
from benchmarks.harness import Contender, Row, compare
from benchmarks.photographs import load_jpegs
from benchmarks.untrained import write_untrained
from orl_fast.config import Config
from orl_fast.cores import num_cores
from orl_fast.mining.executor import Executor
from orl_fast.mining.pipeline import Stage
from orl_fast.mining.rois import open_boxes
from orl_fast.models import Encoder
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.shards.images import decode_rgb
from orl_fast.tables import NeighborTable

COCO = 118_287
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_STEPS = ("features", "neighbors", "rois", "pairs")


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """One group. ResNet-50 at 224 px; with `quick` ResNet-18 at 64 px and at most 10 RoIs per image."""
    config = load_config("tiny", overrides=["mining.max_rois=10", "mining.num_neighbors=10"]) if quick else load_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="orl-fast-bench-") as name:
        folder = Path(name)
        stage = _prepared(folder, load_jpegs(source, limit=16 if quick else 48), config, device)
        reference = _Reference(stage, folder / "photos")
        queries = itertools.cycle(range(len(stage.index)))

        def ours() -> float:
            for step in (*_STEPS, "roi-features"):
                shutil.rmtree(stage.folder / step)
            stage.run(_STEPS)
            return len(stage.index)

        def theirs() -> float:
            reference.pairs_of(next(queries))
            return 1

        contenders = [
            Contender(name="the reference's algorithm, query by query", run=theirs),
            Contender(name="orl-fast mine, after proposals", run=ours),
        ]
        group = f"pairs of {len(stage.index)} pictures, {config.model.backbone}, {device.type}, {num_cores()} cores"
        rows = compare(contenders, unit="images/s", rounds=3 if quick else 5, group=group)
    return [_extrapolated(row) for row in rows]


def _extrapolated(row: Row) -> Row:
    hours = COCO / row.median / 3600
    return replace(row, name=f"{row.name} (COCO: {COCO:,} / {row.median:.3g} per s / 3600 = {hours:,.1f} h)")


def _prepared(folder: Path, jpegs: list[bytes], config: Config, device: torch.device) -> Stage:
    """Packed photographs, a checkpoint of random weights, proposals, and one run of everything."""
    (folder / "photos").mkdir()
    for i, jpeg in enumerate(jpegs):
        (folder / "photos" / f"{i:06d}.jpg").write_bytes(jpeg)
    write_shards([folder / "photos"], folder / "shards", num_workers=1)
    write_untrained(folder / "checkpoint.pt", config)
    index = ShardIndex.open(folder / "shards")
    mined, checkpoint = folder / "mined", folder / "checkpoint.pt"
    executor = Executor(device=device, num_workers=num_cores())
    stage = Stage(index=index, folder=mined, config=config, checkpoint=checkpoint, executor=executor)
    stage.run(("proposals", *_STEPS))
    return stage


class _Reference:
    """The reference's correspondence discovery, with its data in memory as it keeps them: proposals and neighbors as lists."""

    def __init__(self, stage: Stage, photos: Path) -> None:
        self._stage, self._encoder = stage, stage.encoder.to(stage.executor.device)
        self._paths = [photos / name for name in stage.index.file_names]
        self._neighbors: list[list[int]] = NeighborTable.open(stage.folder / "neighbors").neighbors.tolist()
        self._boxes: list[list[list[int]]] = []
        for shard in range(stage.index.num_shards):
            boxes = open_boxes(stage.folder / "proposals", shard)
            for i in range(len(boxes)):
                whole = boxes.of(i)
                self._boxes.append(np.concatenate([whole[:, :2], whole[:, 2:] - whole[:, :2]], axis=1).tolist())

    def pairs_of(self, query: int) -> list[NDArray[np.int64]]:
        own = self._features(query)
        found = []
        for neighbor in self._neighbors[query]:
            cosines = own @ self._features(neighbor).T
            found.append(cosines.flatten().topk(max(1, int(0.1 * len(own)))).indices.cpu().numpy())
        return found

    @torch.inference_mode()
    def _features(self, image: int) -> torch.Tensor:
        """[R, C]: decoded, filtered, cropped and encoded again each time."""
        encoder: Encoder = self._encoder
        limits = self._stage.config.mining
        kept = reference_filter(self._boxes[image], max_rois=limits.max_rois, min_side_px=limits.min_side_px)
        crops = []
        pixels = decode_rgb(self._paths[image].read_bytes())
        for row in kept:
            x, y, w, h = self._boxes[image][row]
            crop = pixels.crop((x, y, x + w, y + h)).resize((limits.roi_size_px, limits.roi_size_px), Image.Resampling.BILINEAR)
            crops.append(functional.normalize(functional.to_tensor(crop), _MEAN, _STD))
        batch = torch.stack(crops).to(self._stage.executor.device, memory_format=torch.channels_last)  # as fast as the network can be fed
        return unit_length(encoder.pooled(batch), dim=1)
