"""Features of whole images and of RoIs, from the online branch of a stage-1 checkpoint (paper, section 3.2).

Images and RoIs of many images are packed into full batches. Each image is decoded once. Batches never span two shards, so that a shard's
features do not depend on where a run was interrupted or on how many processes share the work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from orl_fast.config import MiningConfig
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.files import human_bytes, require_free_space
from orl_fast.mining.parts import array_writer, part_path
from orl_fast.models import Encoder
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable
from orl_fast.views.normalize import normalize
from orl_fast.views.plan import ViewPlan, center_crops, roi_crops
from orl_fast.views.renderer import Renderer

_Item = TypeVar("_Item")
_AHEAD = 2  # rendered plans that wait for the encoder


@dataclass(frozen=True, kw_only=True)
class FeatureWriter:
    """Encodes whole shards, and writes one file of features for each.

    Attributes:
        folder: of the table. advance: told how many views are done.
    """

    folder: Path
    index: ShardIndex
    encoder: Encoder
    mining: MiningConfig
    renderer: Renderer
    device: torch.device
    advance: Callable[[int], None]

    def write_images(self, shards: Sequence[int]) -> None:
        """Write features-NNNNNN.npy, [n, projector_out] float32 of unit length, for some shards (stage 2 i).

        The online projector's output on Resize + CenterCrop, without augmentation, in evaluation mode.
        """
        index, mining = self.index, self.mining

        def plans() -> Iterator[tuple[int, ViewPlan]]:
            for shard in shards:
                rows = np.asarray(index.shard_rows(shard), np.int64)
                for block in np.split(rows, range(mining.encode_batch, len(rows), mining.encode_batch)):
                    sizes = {"heights": index.heights, "widths": index.widths}
                    yield shard, center_crops(block, **sizes, resize_px=mining.resize_px, crop_px=mining.crop_px)

        shapes = {shard: (len(index.shard_rows(shard)), self.encoder.config.model.projector_out) for shard in shards}
        self._write("features", self._encoded(plans(), self.encoder.projected), shapes, np.float32)

    def write_rois(self, shards: Sequence[int], rois: BoxTable) -> None:
        """Write roi-features-NNNNNN.npy, [RoIs of the shard, C] float16 of unit length, for some shards (stage 2 ii).

        The online backbone's globally pooled output on each RoI, resized to a square, in evaluation mode. Every RoI is encoded once; the
        reference does so about eleven times.

        Raises:
            DataError: the disk lacks the room, which is known beforehand.
        """
        shapes = {shard: (rois.num_of(self.index.shard_rows(shard)), self.encoder.num_features) for shard in shards}
        num_rois = sum(num for num, _ in shapes.values())
        num_bytes = num_rois * self.encoder.num_features * 2
        log.info("RoI features: %s RoIs, %s in %s", f"{num_rois:,}", human_bytes(num_bytes), self.folder)
        require_free_space(self.folder, num_bytes=num_bytes, purpose="RoI features")

        def plans() -> Iterator[tuple[int, ViewPlan]]:
            for shard in shards:
                for images in _groups(rois, self.index.shard_rows(shard), at_most=self.mining.encode_batch):
                    rows = np.repeat(np.asarray(images, np.int64), np.diff(rois.offsets[images.start : images.stop + 1]))
                    boxes = rois.boxes[rois.offsets[images.start] : rois.offsets[images.stop]]
                    yield shard, roi_crops(rows, boxes, size_px=self.mining.roi_size_px)

        self._write("roi-features", self._encoded(plans(), self.encoder.pooled), shapes, np.float16)

    def _write(
        self, name: str, encoded: Iterator[tuple[int, Tensor]], shapes: Mapping[int, tuple[int, int]], dtype: type[np.floating[Any]]
    ) -> None:
        for shard, blocks in groupby(encoded, key=lambda entry: entry[0]):
            with array_writer(part_path(self.folder, name, shard), shape=shapes[shard], dtype=dtype) as write:
                for _, features in blocks:
                    write(features.numpy())
                    self.advance(len(features))

    def _encoded(self, plans: Iterable[tuple[int, ViewPlan]], forward: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Render (shard, plan) ahead of the encoder; yield (shard, [b, D] float32 of unit length, on the CPU) in full batches."""
        rendered = _ahead((shard, self._views(plan)) for shard, plan in plans)
        for shard, group in groupby(rendered, key=lambda entry: entry[0]):
            for batch in _full_batches((pixels for _, pixels in group), self.mining.encode_batch):
                with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                    features = forward(normalize(batch.to(self.device, non_blocking=True)))
                    features = unit_length(features.float(), dim=1).cpu()
                yield shard, features

    def _views(self, plan: ViewPlan) -> Tensor:
        rendered = self.renderer.render(plan)
        if len(rendered.bad_rows):
            key, path = self.index.keys[int(rendered.bad_rows[0])], self.index.path
            raise DataError(f"{path}: image {key} cannot be decoded any more; check the shards with orl-fast verify {path}")
        return rendered.batches[0]


def _full_batches(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut and join tensors to `size` entries each; the last has what is left."""
    rest: list[Tensor] = []
    num_rest = 0
    for batch in batches:
        rest.append(batch)
        num_rest += len(batch)
        if num_rest >= size:
            joined = torch.cat(rest)
            num_full = num_rest // size * size
            yield from torch.split(joined[:num_full], size)
            rest, num_rest = [joined[num_full:]], num_rest - num_full
    if num_rest:
        yield torch.cat(rest)


def _ahead(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the items, computed in a thread that is a few of them ahead."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, None) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, iterator, None))
            yield item


def _groups(rois: BoxTable, images: range, *, at_most: int) -> Iterator[range]:
    """Consecutive images with about `at_most` RoIs together: what is rendered at once, so that memory is bounded."""
    start = images.start
    for image in images:
        if image > start and rois.offsets[image + 1] - rois.offsets[start] > at_most:
            yield range(start, image)
            start = image
    yield range(start, images.stop)
