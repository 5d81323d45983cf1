"""Features of whole images and of RoIs, from the online branch of a stage-1 checkpoint (paper, section 3.2).

Images and RoIs of many images are packed into full batches. Each image is decoded once. Batches never span two shards, so that a shard's
features do not depend on where a run was interrupted or on how many processes share the work.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from orl_fast.config import Config, LoaderConfig
from orl_fast.encode import bounded, encode
from orl_fast.errors import DataError
from orl_fast.mining.step import array_writer, part_path
from orl_fast.models import Encoder
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.plan import ViewPlan, center_crops, roi_crops


def write_features(
    shards: Iterable[int],
    device: torch.device,
    num_threads: int,
    *,
    folder: Path,
    index: ShardIndex,
    encoder: Encoder,
    config: Config,
    rois: BoxTable | None = None,
) -> Iterator[int]:
    """Encode whole shards, in evaluation mode, and write one file of unit vectors for each: a worker of an executor.

    Images (stage 2 i): features-NNNNNN.npy, [n, projector_out] float32, the online projector's output on Resize + CenterCrop, without
    augmentation. With `rois` (stage 2 ii): roi-features-NNNNNN.npy, [RoIs of the shard, C] float16, the online backbone's globally pooled
    output on each RoI, resized to a square. Every RoI is encoded once; the reference does so about eleven times.

    `folder` is the table's; of `config`, `mining` and `loader` are used. Yields how many images or RoIs were done since.
    """
    mining, loader = config.mining, config.loader
    name, dtype = ("features", np.float32) if rois is None else ("roi-features", np.float16)
    encoder.to(device)

    def plans() -> Iterator[tuple[int, ViewPlan]]:
        """With their shards, cut into what is rendered at once, so that memory is bounded."""
        resize_px, crop_px, heights, widths = mining.resize_px, mining.crop_px, index.heights, index.widths
        for shard in shards:
            images = index.shard_rows(shard)
            num_crops = np.ones(len(images), np.int64) if rois is None else np.diff(rois.offsets[images.start : images.stop + 1])
            num_bytes = 3 * heights[images.start : images.stop].astype(np.int64) * widths[images.start : images.stop]
            for some in bounded(images, num_crops=num_crops, num_bytes=num_bytes, max_crops=mining.encode_batch):
                rows = np.repeat(np.asarray(some, np.int64), num_crops[some.start - images.start : some.stop - images.start])
                if rois is None:
                    yield shard, center_crops(rows, heights=heights, widths=widths, resize_px=resize_px, crop_px=crop_px)
                else:
                    yield shard, roi_crops(rows, rois.boxes[rois.offsets[some.start] : rois.offsets[some.stop]], size_px=mining.roi_size_px)

    def unit(images: Tensor) -> Tensor:
        return unit_length((encoder.projected if rois is None else encoder.pooled)(images).float(), dim=1)

    def refuse(rows: NDArray[np.int64]) -> None:
        key, path = index.keys[int(rows[0])], index.path
        raise DataError(f"{path}: image {key} can no longer be decoded; check the shards with orl-fast verify {path}")

    with (
        closing(open_source(index, loader)) as source,
        closing(open_renderer(loader.renderer, source, loader, device=device, num_threads=num_threads)) as renderer,
    ):
        encoded = encode(unit, renderer, plans(), batch_size=mining.encode_batch, device=device, skip=refuse)
        for shard, batches in groupby(encoded, key=itemgetter(0)):
            with array_writer(part_path(folder, name, shard)) as write:
                for _, features in batches:
                    write(features.astype(dtype))
                    yield len(features)


def renderer_setting(loader: LoaderConfig) -> dict[str, str]:
    """The renderer as a table records it: mining uses the CPU's unless another is named, whose features differ in their last digits."""
    return {} if loader.renderer in ("auto", "cpu") else {"renderer": loader.renderer}
