"""Partner patches: each RoI that some pair uses as partner, stored once as a small JPEG, so that training need not decode the whole image.

patches-NNNNNN.tar holds {key}.{RoI}.jpg of the images of shard NNNNNN; the table addresses patch p by shard, offset and size.
"""

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orl_fast.files import atomic_file, write_array
from orl_fast.mining.parts import join_arrays, part_path
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import JPEG_QUALITY
from orl_fast.shards.workers import run_in_workers
from orl_fast.shards.writer import BLOCK_BYTES, tar_header
from orl_fast.tables import BoxTable, PairTable, open_array
from orl_fast.views.plan import PATCH_SIDE_PX

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


@dataclass(frozen=True, kw_only=True)
class PatchPacker:
    """Packs the partner patches of whole shards.

    Attributes:
        folder: the patch table.
    """

    folder: Path
    index: ShardIndex
    rois: BoxTable
    pairs: PairTable
    num_workers: int

    def pack(self, shards: Sequence[int], advance: Callable[[int], None]) -> None:
        """Write patches-NNNNNN.tar and its part of the table for some shards, in worker processes."""
        used = partner_rois(self.rois, self.pairs)
        for count in run_in_workers(_pack_shard, (self._task(shard, used) for shard in shards), num_workers=self.num_workers):
            advance(count)

    def join(self) -> None:
        """Write the table's arrays: roi_row [P] int64, sorted; shard [P] int32; offset [P] int64, size [P] int32, bytes."""
        parts = [open_array(self.folder, f"patches-{shard:06d}") for shard in range(self.index.num_shards)]
        num = sum(len(part) for part in parts)
        for name in ENTRY.names or ():
            join_arrays(self.folder / f"{name}.npy", (part[name] for part in parts), shape=(num,), dtype=ENTRY[name])
        shards = (np.full(len(part), shard) for shard, part in enumerate(parts))
        join_arrays(self.folder / "shard.npy", shards, shape=(num,), dtype=np.int32)

    def _task(self, shard: int, used: NDArray[np.bool_]) -> "_Task":
        images = self.index.shard_rows(shard)
        start, stop = self.rois.offsets[images.start], self.rois.offsets[images.stop]
        rows = np.flatnonzero(used[start:stop]) + start
        owners = np.searchsorted(self.rois.offsets, rows, side="right") - 1
        return _Task(
            folder=self.folder,
            index=self.index,
            shard=shard,
            roi_rows=rows,
            images=owners,
            numbers=rows - self.rois.offsets[owners],
            boxes=self.rois.boxes[rows],
        )


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard: per patch its global RoI row, its image, the RoI's number within the image, and its box."""

    folder: Path
    index: ShardIndex
    shard: int
    roi_rows: NDArray[np.int64]
    images: NDArray[np.int64]
    numbers: NDArray[np.int64]
    boxes: NDArray[np.int16]


def _pack_shard(task: _Task) -> int:
    """Write one tar, then its part of the table, which tells the shard is done. Runs in a worker process."""
    entries = np.empty(len(task.roi_rows), ENTRY)
    with atomic_file(task.folder / f"patches-{task.shard:06d}.tar") as file, ShardReader(task.index) as reader:
        image, decoded = -1, Image.new("RGB", (1, 1))
        for i, (row, number) in enumerate(zip(task.images.tolist(), task.numbers.tolist(), strict=True)):
            if row != image:
                image, decoded = row, Image.open(io.BytesIO(reader.read(row))).convert("RGB")
            patch = decoded.crop(tuple(task.boxes[i].tolist())).resize((PATCH_SIDE_PX, PATCH_SIDE_PX), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            patch.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            data = buffer.getvalue()
            file.write(tar_header(f"{task.index.keys[row]}.{number}.jpg", len(data)))
            entries[i] = task.roi_rows[i], file.tell(), len(data)
            file.write(data + bytes(-len(data) % BLOCK_BYTES))
        file.write(bytes(2 * BLOCK_BYTES + -(file.tell() + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE))
    write_array(part_path(task.folder, "patches", task.shard), entries)
    return len(task.index.shard_rows(task.shard))
