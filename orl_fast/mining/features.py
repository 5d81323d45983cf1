"""Features of whole images and of RoIs, from the online branch of a stage-1 checkpoint (paper, section 3.2).

Images and RoIs of many images are packed into full batches. Each image is decoded once. Batches never span two shards, so that a shard's
features do not depend on where a run was interrupted or on how many processes share the work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TypeVar

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


def write_image_features(
    folder: Path,
    shards: Sequence[int],
    *,
    index: ShardIndex,
    encoder: Encoder,
    mining: MiningConfig,
    renderer: Renderer,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Write features-NNNNNN.npy, [n, projector_out] float32 of unit length, for some shards (stage 2 i).

    The online projector's output on Resize + CenterCrop, without augmentation, in evaluation mode.
    """

    def plans() -> Iterator[tuple[int, ViewPlan]]:
        for shard in shards:
            rows = np.asarray(index.shard_rows(shard), np.int64)
            for block in np.split(rows, range(mining.encode_batch, len(rows), mining.encode_batch)):
                sizes = {"heights": index.heights, "widths": index.widths}
                yield shard, center_crops(block, **sizes, resize_px=mining.resize_px, crop_px=mining.crop_px)

    encoded = encode(plans(), encoder.projected, index=index, renderer=renderer, device=device, batch_size=mining.encode_batch)
    for shard, blocks in groupby(encoded, key=lambda entry: entry[0]):
        shape = (len(index.shard_rows(shard)), encoder.config.model.projector_out)
        with array_writer(part_path(folder, "features", shard), shape=shape, dtype=np.float32) as write:
            for _, features in blocks:
                write(features.numpy())
                advance(len(features))


def write_roi_features(
    folder: Path,
    shards: Sequence[int],
    *,
    index: ShardIndex,
    rois: BoxTable,
    encoder: Encoder,
    mining: MiningConfig,
    renderer: Renderer,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Write roi-features-NNNNNN.npy, [RoIs of the shard, C] float16 of unit length, for some shards (stage 2 ii).

    The online backbone's globally pooled output on each RoI, resized to a square, in evaluation mode. Every RoI is encoded once; the
    reference does so about eleven times.

    Raises:
        DataError: the disk lacks the room, which is known beforehand.
    """
    num_rois = {shard: _num_rois(rois, index.shard_rows(shard)) for shard in shards}
    num_bytes = sum(num_rois.values()) * encoder.num_features * 2
    log.info("RoI features: %s RoIs, %s in %s", f"{sum(num_rois.values()):,}", human_bytes(num_bytes), folder)
    require_free_space(folder, num_bytes=num_bytes, purpose="RoI features")

    def plans() -> Iterator[tuple[int, ViewPlan]]:
        for shard in shards:
            for images in _groups(rois, index.shard_rows(shard), at_most=mining.encode_batch):
                rows = np.repeat(np.asarray(images, np.int64), np.diff(rois.offsets[images.start : images.stop + 1]))
                boxes = rois.boxes[rois.offsets[images.start] : rois.offsets[images.stop]]
                yield shard, roi_crops(rows, boxes, size_px=mining.roi_size_px)

    encoded = encode(plans(), encoder.pooled, index=index, renderer=renderer, device=device, batch_size=mining.encode_batch)
    for shard, blocks in groupby(encoded, key=lambda entry: entry[0]):
        shape = (num_rois[shard], encoder.num_features)
        with array_writer(part_path(folder, "roi-features", shard), shape=shape, dtype=np.float16) as write:
            for _, features in blocks:
                write(features.numpy())
                advance(len(features))


def encode(
    plans: Iterable[tuple[int, ViewPlan]],
    forward: Callable[[Tensor], Tensor],
    *,
    index: ShardIndex,
    renderer: Renderer,
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[int, Tensor]]:
    """Render plans of one slot ahead of the encoder, and encode their views in batches as full as shards allow.

    Args:
        plans: (shard, plan).
    Yields:
        (shard, [b, D] float32 on the CPU, of unit length), in order.
    Raises:
        DataError: an image cannot be decoded.
    """

    def views(shard: int, plan: ViewPlan) -> tuple[int, Tensor]:
        rendered = renderer.render(plan)
        if len(rendered.bad_rows):
            key = index.keys[int(rendered.bad_rows[0])]
            raise DataError(f"{index.path}: image {key} cannot be decoded any more; check the shards with orl-fast verify {index.path}")
        return shard, rendered.batches[0]

    rendered = _ahead(views(shard, plan) for shard, plan in plans)
    for shard, group in groupby(rendered, key=lambda entry: entry[0]):
        for batch in _full_batches((pixels for _, pixels in group), batch_size):
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                features = unit_length(forward(normalize(batch.to(device, non_blocking=True))).float(), dim=1).cpu()
            yield shard, features


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


def _num_rois(rois: BoxTable, images: range) -> int:
    return int(rois.offsets[images.stop] - rois.offsets[images.start])


def _groups(rois: BoxTable, images: range, *, at_most: int) -> Iterator[range]:
    """Consecutive images with about `at_most` RoIs together: what is rendered at once, so that memory is bounded."""
    start = images.start
    for image in images:
        if image > start and rois.offsets[image + 1] - rois.offsets[start] > at_most:
            yield range(start, image)
            start = image
    yield range(start, images.stop)
