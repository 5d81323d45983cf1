"""Features of whole images and of RoIs, from the online branch of a stage-1 checkpoint (paper, section 3.2).

Images and RoIs of many images are packed into full batches. Each image is decoded once. Batches never span two shards, so that a shard's
features do not depend on where a run was interrupted or on how many processes share the work.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from orl_fast.config import Config, LoaderConfig
from orl_fast.encode import bounded, encode
from orl_fast.errors import DataError
from orl_fast.mining.parts import array_writer, part_path
from orl_fast.models import Encoder
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.plan import ViewPlan, center_crops, roi_crops

_Plans = Iterator[tuple[int, ViewPlan]]  # with the shard of each


@dataclass(frozen=True, kw_only=True)
class FeatureWriter:
    """Encodes whole shards, in evaluation mode, and writes one file of features for each. Its methods are workers of an executor.

    Attributes:
        folder: of the table. config: `mining` and `loader` are used.
    """

    folder: Path
    index: ShardIndex
    encoder: Encoder
    config: Config

    def write_images(self, shards: Iterable[int], device: torch.device, num_threads: int) -> Iterator[int]:
        """Write features-NNNNNN.npy, [n, projector_out] float32 of unit length, for some shards (stage 2 i); yield how many are done.

        The online projector's output on Resize + CenterCrop, without augmentation.
        """
        index, mining = self.index, self.config.mining

        def plan(images: range) -> ViewPlan:
            rows = np.asarray(images, np.int64)
            return center_crops(rows, heights=index.heights, widths=index.widths, resize_px=mining.resize_px, crop_px=mining.crop_px)

        plans = ((shard, plan(images)) for shard in shards for images in self._ranges(shard))
        return self._write("features", plans, self.encoder.to(device).projected, np.float32, device, num_threads)

    def write_rois(self, shards: Iterable[int], device: torch.device, num_threads: int, *, rois: BoxTable) -> Iterator[int]:
        """Write roi-features-NNNNNN.npy, [RoIs of the shard, C] float16 of unit length, for some shards (stage 2 ii); yield as above.

        The online backbone's globally pooled output on each RoI, resized to a square. Every RoI is encoded once; the reference does so
        about eleven times.
        """

        def plan(images: range) -> ViewPlan:
            offsets = rois.offsets[images.start : images.stop + 1]
            boxes = rois.boxes[offsets[0] : offsets[-1]]
            return roi_crops(np.repeat(np.asarray(images, np.int64), np.diff(offsets)), boxes, size_px=self.config.mining.roi_size_px)

        plans = ((shard, plan(images)) for shard in shards for images in self._ranges(shard, rois))
        return self._write("roi-features", plans, self.encoder.to(device).pooled, np.float16, device, num_threads)

    def _ranges(self, shard: int, rois: BoxTable | None = None) -> Iterator[range]:
        """The images of a shard, cut into what is rendered at once, so that memory is bounded."""
        images = self.index.shard_rows(shard)
        rows = slice(images.start, images.stop)
        num_crops = np.ones(len(images), np.int64) if rois is None else np.diff(rois.offsets[rows.start : rows.stop + 1])
        num_bytes = 3 * self.index.heights[rows].astype(np.int64) * self.index.widths[rows]
        return bounded(images, num_crops=num_crops, num_bytes=num_bytes, max_crops=self.config.mining.encode_batch)

    def _write(
        self, name: str, plans: _Plans, forward: Callable[[Tensor], Tensor], dtype: DTypeLike, device: torch.device, num_threads: int
    ) -> Iterator[int]:
        """Encode the plans of each shard, and write unit vectors."""
        loader = self.config.loader

        def unit(images: Tensor) -> Tensor:
            return unit_length(forward(images).float(), dim=1)

        def refuse(rows: NDArray[np.int64]) -> None:
            key, path = self.index.keys[int(rows[0])], self.index.path
            raise DataError(f"{path}: image {key} can no longer be decoded; check the shards with orl-fast verify {path}")

        with (
            closing(open_source(self.index, loader)) as source,
            closing(open_renderer(loader.renderer, source, loader, device=device, num_threads=num_threads)) as renderer,
        ):
            batch_size = self.config.mining.encode_batch
            encoded = encode(unit, renderer, plans, batch_size=batch_size, device=device, skip=refuse)
            for shard, batches in groupby(encoded, key=itemgetter(0)):
                with array_writer(part_path(self.folder, name, shard)) as write:
                    for _, features in batches:
                        write(features.astype(dtype))
                        yield len(features)


def renderer_setting(loader: LoaderConfig) -> dict[str, str]:
    """The renderer as a table records it: mining uses the CPU's unless another is named, whose features differ in their last digits."""
    return {} if loader.renderer in ("auto", "cpu") else {"renderer": loader.renderer}
