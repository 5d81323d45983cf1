"""Corresponding RoIs: the most similar RoI pairs of each image and each of its neighbors (paper, section 3.2, stage 2 iii).

Cosines are products of halves, which float64 sums without rounding, rounded to float32 once. So the order of pairs depends on neither
blocks nor threads nor the device; of equal cosines the first in the matrix leads: by the query's RoI, then the partner's.

Partner patches are RoIs that some pair uses as partner, each stored once as a small JPEG, which saves a second decode during training.
patches-NNNNNN.tar holds {key}.{RoI}.jpg of the images of shard NNNNNN; the table addresses patch p by shard, offset and size.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from orl_fast.config import Variant
from orl_fast.files import write_array
from orl_fast.mining.executor import Executor
from orl_fast.mining.step import array_writer, join_arrays, open_part, part_path
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import JPEG_QUALITY, decode_rgb
from orl_fast.shards.writer import new_tar
from orl_fast.tables import BoxTable, PairTable, num_pairs
from orl_fast.views.patches import PATCH_SIDE_PX

# One row per pair. Numbers of RoIs within their images; the cosine as float32.
PAIR = np.dtype([("query_roi", "<i2"), ("partner_roi", "<i2"), ("similarity", "<f4")])
_PATCH = np.dtype([("roi_row", "<i8"), ("offset", "<i8"), ("size", "<i4")])
_BLOCK_IMAGES = 1 << 14


def top_pairs(
    query: NDArray[np.float16], partners: Sequence[NDArray[np.float16]], *, pair_ratio: float, variant: Variant, device: torch.device
) -> list[NDArray[Any]]:
    """The best pairs of one image with each of its neighbors, best first.

    Args:
        query: [R, C] features of the image's RoIs, of unit length. partners: [R', C] of each neighbor's.
        pair_ratio, variant: how many are kept, see `orl_fast.tables.num_pairs`.
    Returns:
        Per neighbor, a [P] array of PAIR: the top P of the flattened matrix [R, R'].
    """
    sizes = [len(partner) for partner in partners]
    counts = num_pairs(len(query), sizes, pair_ratio=pair_ratio, variant=variant).tolist()
    joined = torch.from_numpy(np.concatenate(partners)).to(device).double()  # [sum R', C]
    cosines = (torch.from_numpy(np.array(query)).to(device).double() @ joined.T).float() + 0.0  # [R, sum R']; + 0.0: no negative zero
    matrices = [scores.reshape(-1) for scores in torch.split(cosines, sizes, dim=1)]
    best = [scores.topk(min(count + 1, len(scores))) for scores, count in zip(matrices, counts, strict=True)]  # one more shows ties
    ends = np.cumsum([len(top.values) for top in best])[:-1]
    values, places = (np.split(torch.cat(parts).cpu().numpy(), ends) for parts in zip(*best, strict=True))
    found = []
    for scores, size, count, similarities, rows in zip(matrices, sizes, counts, values, places, strict=True):
        if (similarities[1:] == similarities[:-1]).any():  # topk orders equal entries as it likes
            rows = scores.sort(descending=True, stable=True).indices[:count].cpu().numpy()
        pairs = np.empty(count, PAIR)
        pairs["query_roi"], pairs["partner_roi"] = np.divmod(rows[:count], size)
        pairs["similarity"] = similarities[:count]
        found.append(pairs)
    return found


@dataclass(frozen=True, kw_only=True)
class PairMiner:
    """Finds the pairs of whole shards and joins them into a table and column shards. `mine` is a worker of an executor."""

    mined: Path  # the folder of all tables
    index: ShardIndex
    rois: BoxTable
    neighbors: NDArray[np.int64]  # [N, K] rows
    pair_ratio: float
    variant: Variant

    def mine(self, shards: Iterable[int], device: torch.device, num_threads: int) -> Iterator[int]:
        """Write pairs-NNNNNN.npy, [T] of PAIR, for some shards; yield how many images are done."""
        del num_threads
        part = lru_cache(maxsize=256)(partial(open_part, self.mined / "roi-features", "roi-features"))  # a map holds a descriptor

        def features(image: int) -> NDArray[np.float16]:
            """[R, C], read from the shards' memory-mapped files."""
            shard = int(self.index.shard_ids[image])
            start, stop = self.rois.offsets[image : image + 2] - self.rois.offsets[self.index.shard_rows(shard).start]
            return part(shard)[start:stop]

        for shard in shards:
            with array_writer(part_path(self.mined / "pairs", "pairs", shard)) as write:
                for image in self.index.shard_rows(shard):
                    partners = [features(row) for row in self.neighbors[image].tolist()]
                    found = top_pairs(features(image), partners, pair_ratio=self.pair_ratio, variant=self.variant, device=device)
                    write(np.concatenate(found))
                    yield 1

    def join(self) -> None:
        """Write the arrays of the PairTable, and pairs-NNNNNN.tar next to them."""
        folder, counts = self.mined / "pairs", self.rois.counts
        count = num_pairs(counts[:, None], counts[self.neighbors], pair_ratio=self.pair_ratio, variant=self.variant)
        write_array(folder / "neighbors.npy", self.neighbors)
        write_array(folder / "first.npy", np.cumsum(count).reshape(count.shape) - count)
        write_array(folder / "count.npy", count.astype(np.int32))
        for name, column in (("query_roi", "query_roi"), ("partner_roi", "partner_roi"), ("similarities", "similarity")):
            join_arrays(folder / f"{name}.npy", (open_part(folder, "pairs", shard)[column] for shard in range(self.index.num_shards)))
        write_pair_shards(folder, index=self.index, rois=self.rois, pairs=PairTable.open(folder))


def write_pair_shards(folder: Path, *, index: ShardIndex, rois: BoxTable, pairs: PairTable) -> None:
    """Write pairs-NNNNNN.tar (WebDataset): the mined components of each sample of images-NNNNNN.tar, under the same keys, in that order.

    {key}.rois.npy [R, 4] int16; {key}.neighbors.npy [K] int64, rows; {key}.pairs.npy [n, 9] int32: which neighbor, the query's box, the
    partner's box (xyxy), by neighbor, best first; {key}.similarity.npy [n] float32.
    """
    for shard, path in enumerate(index.shard_paths):
        with new_tar(folder / path.name.replace("images", "pairs")) as add:
            for image in index.shard_rows(shard):
                neighbors, counts = pairs.neighbors[image], pairs.count[image]
                rows = np.concatenate([np.arange(n) + first for first, n in zip(pairs.first[image], counts, strict=True)])
                slot = np.repeat(np.arange(len(neighbors)), counts)
                query = rois.of(image)[pairs.query_roi[rows]]
                partner = rois.boxes[rois.offsets[neighbors[slot]] + pairs.partner_roi[rows]]
                entries = np.concatenate([slot[:, None], query, partner], axis=1).astype(np.int32)
                components = {"rois": rois.of(image), "neighbors": neighbors, "pairs": entries, "similarity": pairs.similarities[rows]}
                for name, array in components.items():
                    buffer = io.BytesIO()
                    np.save(buffer, np.ascontiguousarray(array))
                    add(f"{index.keys[image]}.{name}.npy", buffer.getvalue())


def pack_patches(folder: Path, shards: Sequence[int], *, index: ShardIndex, executor: Executor) -> Iterator[int]:
    """Write patches-NNNNNN.tar and its part of the table for some shards, in parallel; yield how many images are done.

    The folder is next to those of RoIs and pairs.
    """
    rois, pairs = BoxTable.open(folder.parent / "rois"), PairTable.open(folder.parent / "pairs")
    used = np.zeros(len(rois.boxes), np.bool_)  # which RoIs are some pair's partner
    for start in range(0, len(rois), _BLOCK_IMAGES):
        block = slice(start, start + _BLOCK_IMAGES)
        count, first = pairs.count[block].reshape(-1).astype(np.int64), pairs.first[block].reshape(-1)
        rows = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())  # pairs of the block
        used[np.repeat(rois.offsets[pairs.neighbors[block].reshape(-1)], count) + pairs.partner_roi[rows]] = True

    def roi_rows(images: range) -> NDArray[np.int64]:
        start = rois.offsets[images.start]
        return np.asarray(np.flatnonzero(used[start : rois.offsets[images.stop]]) + start)

    yield from executor.map(partial(_pack_shard, folder, index), ((shard, roi_rows(index.shard_rows(shard))) for shard in shards))


def _pack_shard(folder: Path, index: ShardIndex, task: tuple[int, NDArray[np.int64]]) -> int:
    """Write one tar of the RoIs in these rows, then its part of the table, which marks the shard as done. Runs in a worker process."""
    shard, roi_rows = task
    rois, entries = BoxTable.open(folder.parent / "rois"), np.empty(len(roi_rows), _PATCH)
    owners = np.searchsorted(rois.offsets, roi_rows, side="right") - 1
    with new_tar(folder / f"patches-{shard:06d}.tar") as add, ShardReader(index) as reader:
        image, decoded = -1, Image.new("RGB", (1, 1))
        for i, (roi_row, owner) in enumerate(zip(roi_rows.tolist(), owners.tolist(), strict=True)):
            if owner != image:
                image, decoded = owner, decode_rgb(reader.read(owner))
            patch = decoded.crop(tuple(rois.boxes[roi_row].tolist())).resize((PATCH_SIDE_PX, PATCH_SIDE_PX), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            patch.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            data = buffer.getvalue()
            entries[i] = roi_row, add(f"{index.keys[owner]}.{roi_row - rois.offsets[owner]}.jpg", data), len(data)
    write_array(part_path(folder, "patches", shard), entries)
    return len(index.shard_rows(shard))


def join_patches(folder: Path, *, num_shards: int) -> None:
    """Write the table's arrays: roi_row [P] int64, sorted; shard [P] int32; offset [P] int64, size [P] int32, bytes."""
    for name in _PATCH.names or ():
        join_arrays(folder / f"{name}.npy", (open_part(folder, "patches", shard)[name] for shard in range(num_shards)))
    sizes = (len(open_part(folder, "patches", shard)) for shard in range(num_shards))
    join_arrays(folder / "shard.npy", (np.full(size, shard, np.int32) for shard, size in enumerate(sizes)))
