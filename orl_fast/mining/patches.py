"""Partner patches: each RoI that some pair uses as partner, stored once as a small JPEG, which saves a second decode during training.

patches-NNNNNN.tar holds {key}.{RoI}.jpg of the images of shard NNNNNN; the table addresses patch p by shard, offset and size.
"""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orl_fast.files import write_array
from orl_fast.mining.executor import Executor
from orl_fast.mining.parts import join_arrays, open_part, part_path
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import JPEG_QUALITY
from orl_fast.shards.writer import new_tar
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.patches import PATCH_SIDE_PX

_BLOCK_IMAGES = 1 << 14
ENTRY = np.dtype([("roi_row", "<i8"), ("offset", "<i8"), ("size", "<i4")])


def partner_rois(rois: BoxTable, pairs: PairTable) -> NDArray[np.bool_]:
    """[total RoIs] bool: which RoIs are some pair's partner."""
    used = np.zeros(len(rois.boxes), np.bool_)
    for start in range(0, len(rois), _BLOCK_IMAGES):
        block = slice(start, start + _BLOCK_IMAGES)
        count, first = pairs.count[block].reshape(-1).astype(np.int64), pairs.first[block].reshape(-1)
        rows = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())  # pairs of the block
        used[np.repeat(rois.offsets[pairs.neighbors[block].reshape(-1)], count) + pairs.partner_roi[rows]] = True
    return used


def pack_shards(
    folder: Path, shards: Sequence[int], *, index: ShardIndex, rois: BoxTable, pairs: PairTable, executor: Executor
) -> Iterator[int]:
    """Write patches-NNNNNN.tar and its part of the table for some shards, in parallel; yield how many images are done."""
    used = partner_rois(rois, pairs)
    tasks = (_task(shard, index.shard_rows(shard), rois, used) for shard in shards)
    yield from executor.map(partial(_pack_shard, folder, index), tasks)


def join_patches(folder: Path, *, num_shards: int) -> None:
    """Write the table's arrays: roi_row [P] int64, sorted; shard [P] int32; offset [P] int64, size [P] int32, bytes."""
    shards = range(num_shards)
    for name in ENTRY.names or ():
        join_arrays(folder / f"{name}.npy", (open_part(folder, "patches", shard)[name] for shard in shards))
    numbers = (np.full(len(open_part(folder, "patches", shard)), shard, np.int32) for shard in shards)
    join_arrays(folder / "shard.npy", numbers)


class _Task(NamedTuple):
    """One shard: per patch its global RoI row, its image, the RoI's number within the image, and its box."""

    shard: int
    roi_rows: NDArray[np.int64]
    images: NDArray[np.int64]
    numbers: NDArray[np.int64]
    boxes: NDArray[np.int16]


def _task(shard: int, images: range, rois: BoxTable, used: NDArray[np.bool_]) -> _Task:
    start, stop = rois.offsets[images.start], rois.offsets[images.stop]
    rows = np.flatnonzero(used[start:stop]) + start
    owners = np.searchsorted(rois.offsets, rows, side="right") - 1
    return _Task(shard=shard, roi_rows=rows, images=owners, numbers=rows - rois.offsets[owners], boxes=rois.boxes[rows])


def _pack_shard(folder: Path, index: ShardIndex, task: _Task) -> int:
    """Write one tar, then its part of the table, which marks the shard as done. Runs in a worker process."""
    entries = np.empty(len(task.roi_rows), ENTRY)
    with new_tar(folder / f"patches-{task.shard:06d}.tar") as add, ShardReader(index) as reader:
        image, decoded = -1, Image.new("RGB", (1, 1))
        for i, (row, number) in enumerate(zip(task.images.tolist(), task.numbers.tolist(), strict=True)):
            if row != image:
                image, decoded = row, Image.open(io.BytesIO(reader.read(row))).convert("RGB")
            patch = decoded.crop(tuple(task.boxes[i].tolist())).resize((PATCH_SIDE_PX, PATCH_SIDE_PX), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            patch.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            data = buffer.getvalue()
            entries[i] = task.roi_rows[i], add(f"{index.keys[row]}.{number}.jpg", data), len(data)
    write_array(part_path(folder, "patches", task.shard), entries)
    return len(index.shard_rows(task.shard))
