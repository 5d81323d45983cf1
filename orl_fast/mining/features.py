"""Features of whole images and of RoIs, from the online branch of a stage-1 checkpoint (paper, section 3.2).

Images and RoIs of many images are packed into full batches. Each image is decoded once. Batches never span two shards, so that a shard's
features do not depend on where a run was interrupted or on how many processes share the work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.files import human_bytes, require_free_space
from orl_fast.mining.parts import Advance, array_writer, part_path, pieces
from orl_fast.models import Encoder
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.tables import BoxTable
from orl_fast.views.normalize import normalize
from orl_fast.views.plan import ViewPlan, center_crops, roi_crops
from orl_fast.views.renderer import Renderer, choose_renderer

_Item = TypeVar("_Item")
_Plans = Callable[[range], Iterator[ViewPlan]]  # of some images
_AHEAD = 2  # rendered plans that wait for the encoder


@dataclass(frozen=True, kw_only=True)
class FeatureWriter:
    """Encodes whole shards, in evaluation mode, and writes one file of features for each.

    Attributes:
        folder: of the table. config: `mining` and `loader` are used.
    """

    folder: Path
    index: ShardIndex
    encoder: Encoder
    config: Config
    device: torch.device
    num_workers: int

    def write_images(self, shards: Sequence[int], advance: Advance) -> None:
        """Write features-NNNNNN.npy, [n, projector_out] float32 of unit length, for some shards (stage 2 i).

        The online projector's output on Resize + CenterCrop, without augmentation.
        """

        def plans(images: range) -> Iterator[ViewPlan]:
            return map(self._whole_images, pieces(images, self.config.mining.encode_batch))

        self._write("features", shards, advance, plans, self.encoder.projected, np.float32)

    def write_rois(self, shards: Sequence[int], advance: Advance, *, rois: BoxTable) -> None:
        """Write roi-features-NNNNNN.npy, [RoIs of the shard, C] float16 of unit length, for some shards (stage 2 ii).

        The online backbone's globally pooled output on each RoI, resized to a square. Every RoI is encoded once; the reference does so
        about eleven times.

        Raises:
            DataError: the disk lacks the room, which is known beforehand.
        """
        mining = self.config.mining
        num_rois = sum(rois.num_of(self.index.shard_rows(shard)) for shard in shards)
        num_bytes = num_rois * self.encoder.num_features * 2
        log.info("RoI features: %s RoIs, %s in %s", f"{num_rois:,}", human_bytes(num_bytes), self.folder)
        require_free_space(self.folder, num_bytes=num_bytes, purpose="RoI features")

        def plans(images: range) -> Iterator[ViewPlan]:
            for some in _groups(rois, images, at_most=mining.encode_batch):
                offsets = rois.offsets[some.start : some.stop + 1]
                boxes = rois.boxes[offsets[0] : offsets[-1]]
                yield roi_crops(np.repeat(np.asarray(some, np.int64), np.diff(offsets)), boxes, size_px=mining.roi_size_px)

        self._write("roi-features", shards, advance, plans, self.encoder.pooled, np.float16)

    def _write(
        self, name: str, shards: Sequence[int], advance: Advance, plans: _Plans, forward: Callable[[Tensor], Tensor], dtype: DTypeLike
    ) -> None:
        """Render the plans of each shard's images, ahead of the encoder; encode them in full batches, and write unit vectors."""
        trial, loader = self._whole_images(range(min(len(self.index), 64))), self.config.loader
        with (
            ShardReader(self.index) as reader,
            closing(choose_renderer(reader, loader, trial=trial, device=self.device, num_threads=self.num_workers)) as renderer,
        ):
            rendered = _ahead((shard, self._views(renderer, plan)) for shard in shards for plan in plans(self.index.shard_rows(shard)))
            for shard, views in groupby(rendered, key=itemgetter(0)):
                with array_writer(part_path(self.folder, name, shard)) as write:
                    for batch in _full_batches((pixels for _, pixels in views), self.config.mining.encode_batch):
                        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                            features = forward(normalize(batch.to(self.device, non_blocking=True)))
                            features = unit_length(features.float(), dim=1).cpu()
                        write(features.numpy().astype(dtype))
                        advance(len(features))

    def _whole_images(self, images: range) -> ViewPlan:
        index, mining, rows = self.index, self.config.mining, np.asarray(images, np.int64)
        return center_crops(rows, heights=index.heights, widths=index.widths, resize_px=mining.resize_px, crop_px=mining.crop_px)

    def _views(self, renderer: Renderer, plan: ViewPlan) -> Tensor:
        rendered = renderer.render(plan)
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
