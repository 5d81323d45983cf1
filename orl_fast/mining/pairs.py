"""Corresponding RoIs: the most similar RoI pairs of each image and each of its neighbors (paper, section 3.2, stage 2 iii).

Similarities are exact: features are halves, whose products, and the sums of those, float64 holds without rounding. Hence the order of
pairs depends on neither blocks nor threads nor the device; pairs equal in float32 are ordered by the query's RoI, then the partner's.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.config import Compat
from orl_fast.files import atomic_file
from orl_fast.mining.parts import array_writer, join_arrays, part_path
from orl_fast.shards import ShardIndex
from orl_fast.shards.writer import BLOCK_BYTES, tar_header
from orl_fast.tables import BoxTable, PairTable, num_pairs, open_array

# One row per pair. Numbers of RoIs within their images; the cosine as float32.
PAIR = np.dtype([("query_roi", "<i2"), ("partner_roi", "<i2"), ("similarity", "<f4")])
_MAGNITUDE = 0x7FFFFFFF


class RoiFeatures:
    """Features of RoIs, read from the shards' memory-mapped files: `of(i)` is [R, C] float16 of unit length."""

    def __init__(self, folder: Path, index: ShardIndex, rois: BoxTable) -> None:
        self._folder, self._index, self._rois = folder, index, rois
        self._part = lru_cache(maxsize=256)(lambda shard: open_array(folder, f"roi-features-{shard:06d}"))  # a map holds a descriptor

    def of(self, image: int) -> NDArray[np.float16]:
        shard = int(self._index.shard_ids[image])
        first = self._rois.offsets[self._index.shard_rows(shard).start]
        start, stop = self._rois.offsets[image] - first, self._rois.offsets[image + 1] - first
        part: NDArray[np.float16] = self._part(shard)
        return part[start:stop]


def top_pairs(
    query: NDArray[np.float16], partners: Sequence[NDArray[np.float16]], *, pair_ratio: float, compat: Compat, device: torch.device
) -> list[NDArray[Any]]:
    """The best pairs of one image with each of its neighbors, best first.

    Args:
        query: [R, C] features of the image's RoIs, of unit length. partners: [R', C] of each neighbor's.
        pair_ratio, compat: how many are kept, see `orl_fast.tables.num_pairs`.
    Returns:
        Per neighbor, a [P] array of PAIR: the top P of the flattened matrix [R, R'].
    """
    sizes = [len(partner) for partner in partners]
    counts = num_pairs(len(query), sizes, pair_ratio=pair_ratio, compat=compat)
    joined = torch.from_numpy(np.concatenate(partners)).to(device).double()  # [sum R', C]
    cosines = (torch.from_numpy(np.array(query)).to(device).double() @ joined.T).float()  # [R, sum R'], rounded once
    # Similarity and place in one integer, so that no two are equal. The bits of floats order as integers do, but for the sign.
    bits = (cosines + 0.0).view(torch.int32).long()  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, -(bits & _MAGNITUDE), bits)
    best = []
    for scores, count in zip(torch.split(ordered, sizes, dim=1), counts.tolist(), strict=True):
        keys = (scores.reshape(-1) << 32) - torch.arange(scores.numel(), device=device)  # [R * R']
        best.append(keys.topk(count).values)
    all_keys = torch.cat(best).cpu().numpy()
    pairs = np.empty(len(all_keys), PAIR)
    places = -all_keys & 0xFFFFFFFF
    pairs["query_roi"], pairs["partner_roi"] = np.divmod(places, np.repeat(sizes, counts))
    ordered_bits = (all_keys + places) >> 32
    sign = np.int64(1 << 31) * (ordered_bits < 0)
    pairs["similarity"] = (np.abs(ordered_bits) | sign).astype(np.uint32).view(np.float32)
    return np.split(pairs, np.cumsum(counts)[:-1])


@dataclass(frozen=True, kw_only=True)
class PairMiner:
    """Finds the pairs of whole shards and joins them into a table and column shards.

    Attributes:
        folder: the pair table. neighbors: [N, K] int64. features: of all RoIs.
    """

    folder: Path
    index: ShardIndex
    rois: BoxTable
    neighbors: NDArray[np.int64]
    features: RoiFeatures
    pair_ratio: float
    compat: Compat
    device: torch.device

    def mine(self, shards: Sequence[int], advance: Callable[[int], None]) -> None:
        """Write pairs-NNNNNN.npy, [T] of PAIR, for some shards."""
        for shard in shards:
            images = self.index.shard_rows(shard)
            num = int(self._counts(images).sum())
            with array_writer(part_path(self.folder, "pairs", shard), shape=(num,), dtype=PAIR) as write:
                for image in images:
                    partners = [self.features.of(neighbor) for neighbor in self.neighbors[image].tolist()]
                    query = self.features.of(image)
                    found = top_pairs(query, partners, pair_ratio=self.pair_ratio, compat=self.compat, device=self.device)
                    write(np.concatenate(found))
                    advance(1)

    def join(self) -> None:
        """Write the arrays of the PairTable, and pairs-NNNNNN.tar beside them."""
        num_images, num_neighbors = self.neighbors.shape
        shards = range(self.index.num_shards)
        counts = [self._counts(self.index.shard_rows(shard)) for shard in shards]
        num = int(sum(count.sum() for count in counts))
        shape = (num_images, num_neighbors)
        ends = np.cumsum([0, *(count.sum() for count in counts)])
        firsts = (end + (np.cumsum(count) - count.reshape(-1)).reshape(count.shape) for end, count in zip(ends, counts, strict=False))
        join_arrays(self.folder / "neighbors.npy", self._blocks(self.neighbors), shape=shape, dtype=np.int64)
        join_arrays(self.folder / "first.npy", firsts, shape=shape, dtype=np.int64)
        join_arrays(self.folder / "count.npy", counts, shape=shape, dtype=np.int32)
        for name, column, dtype in (
            ("query_roi", "query_roi", np.int16),
            ("partner_roi", "partner_roi", np.int16),
            ("similarities", "similarity", np.float32),
        ):
            parts = (open_array(self.folder, f"pairs-{shard:06d}")[column] for shard in shards)
            join_arrays(self.folder / f"{name}.npy", parts, shape=(num,), dtype=dtype)
        write_pair_shards(self.folder, index=self.index, rois=self.rois, pairs=PairTable.open(self.folder))

    def _counts(self, images: range) -> NDArray[np.int32]:
        """[n, K]: pairs of each image of a shard with each of its neighbors."""
        ends, neighbors = self.rois.offsets, self.neighbors[images.start : images.stop]
        queries, partners = np.diff(ends[images.start : images.stop + 1]), ends[neighbors + 1] - ends[neighbors]
        return num_pairs(queries[:, None], partners, pair_ratio=self.pair_ratio, compat=self.compat).astype(np.int32)

    def _blocks(self, array: NDArray[Any]) -> Iterator[NDArray[Any]]:
        for shard in range(self.index.num_shards):
            rows = self.index.shard_rows(shard)
            yield array[rows.start : rows.stop]


def write_pair_shards(folder: Path, *, index: ShardIndex, rois: BoxTable, pairs: PairTable) -> None:
    """Write pairs-NNNNNN.tar: the mined components of each sample of images-NNNNNN.tar, under the same keys, in the same order.

    {key}.rois.npy [R, 4] int16; {key}.neighbors.npy [K] int64, rows; {key}.pairs.npy [n, 9] int32: which neighbor, the query's box, the
    partner's box (xyxy), by neighbor, best first; {key}.similarity.npy [n] float32.
    """
    for shard in range(index.num_shards):
        with atomic_file(folder / index.shard_paths[shard].name.replace("images", "pairs")) as file:
            for image in index.shard_rows(shard):
                neighbors, counts = pairs.neighbors[image], pairs.count[image]
                rows = np.concatenate([np.arange(n) + first for first, n in zip(pairs.first[image], counts, strict=True)])
                slot = np.repeat(np.arange(len(neighbors)), counts)
                query = rois.of(image)[pairs.query_roi[rows]]
                partner = rois.boxes[rois.offsets[neighbors[slot]] + pairs.partner_roi[rows]]
                components = {
                    "rois": rois.of(image),
                    "neighbors": neighbors,
                    "pairs": np.concatenate([slot[:, None], query, partner], axis=1).astype(np.int32),
                    "similarity": pairs.similarities[rows],
                }
                for name, array in components.items():
                    buffer = io.BytesIO()
                    np.save(buffer, np.ascontiguousarray(array))
                    data = buffer.getvalue()
                    file.write(tar_header(f"{index.keys[image]}.{name}.npy", len(data)) + data + bytes(-len(data) % BLOCK_BYTES))
            file.write(bytes(2 * BLOCK_BYTES + -(file.tell() + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE))
