"""From proposals to pairs: the reference's algorithm against ours, on the same photographs, proposals and network.

The reference takes one query at a time: filter its boxes and those of its ten neighbors in Python, crop and resize with PIL, encode image
by image, compare. So every image is decoded, cropped and encoded about eleven times. Proposals have their own benchmark. Both are
extrapolated to COCO train2017, and the arithmetic stands in the names of the rows.

A second group asks whether RoI features wait for their views: what the encoder alone takes, and what rendering RoIs alone does.
"""

import itertools
import shutil
import tempfile
import time
from contextlib import closing
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
from orl_fast.config import Config, LoaderConfig
from orl_fast.cores import num_cores
from orl_fast.mining.executor import Executor
from orl_fast.mining.pipeline import Stage
from orl_fast.mining.rois import open_boxes
from orl_fast.models import Encoder
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.shards.images import decode_rgb
from orl_fast.shards.pixels import write_pixels
from orl_fast.tables import BoxTable, NeighborTable
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.normalize import normalize
from orl_fast.views.plan import roi_crops

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
        rows = [_extrapolated(row) for row in compare(contenders, unit="images/s", rounds=3 if quick else 5, group=group)]
        group = (
            f"RoI features at {config.mining.roi_size_px} px, {config.model.backbone}, {device.type}, CPU time of one core for the views"
        )
        return rows + compare(_roi_features(stage, config), unit="RoIs/s", rounds=3 if quick else 5, group=group, clock=time.process_time)


def _roi_features(stage: Stage, config: Config) -> list[Contender]:
    """The encoder alone, and rendering alone, from JPEGs and from pixel shards. On a GPU the encoder's time is its own."""
    index, rois, device = stage.index, BoxTable.open(stage.folder / "rois"), stage.executor.device
    write_pixels(index, num_workers=1)
    encoder, size_px, batch_size = stage.encoder.to(device), config.mining.roi_size_px, config.mining.encode_batch
    batch = torch.randint(0, 256, (min(batch_size, 16 if device.type == "cpu" else batch_size), 3, size_px, size_px), dtype=torch.uint8)
    batch = batch.to(device, memory_format=torch.channels_last)

    def encoding() -> float:
        torch.set_num_threads(1)
        with torch.inference_mode():
            encoder.pooled(normalize(batch)).cpu()
        return len(batch)

    def rendering(loader: LoaderConfig) -> float:
        torch.set_num_threads(1)
        rows = np.repeat(np.arange(len(index)), rois.counts)
        with (
            closing(open_source(index, loader)) as source,
            closing(open_renderer("cpu", source, loader, device=torch.device("cpu"), num_threads=1)) as renderer,
        ):
            for image in range(len(index)):  # all RoIs of an image in one plan: it is decoded once
                boxes = rois.of(image)
                normalize(renderer.render(roi_crops(np.full(len(boxes), image), boxes, size_px=size_px)).views["view"])
        return len(rows)

    return [
        Contender(name="the encoder alone", run=encoding),
        Contender(name="rendering and normalizing alone, JPEGs", run=lambda: rendering(LoaderConfig(pixels="never"))),
        Contender(name="rendering and normalizing alone, pixel shards", run=lambda: rendering(LoaderConfig(pixels="always"))),
    ]


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
