"""Corresponding RoIs: the most similar RoI pairs of each image and each of its neighbors (paper, section 3.2, stage 2 iii).

Similarities are exact: features are halves, whose products, and the sums of those, float64 holds without rounding. Hence the order of
pairs depends on neither blocks nor threads nor the device; pairs equal in float32 are ordered by the query's RoI, then the partner's.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.config import Compat
from orl_fast.files import write_array
from orl_fast.mining.parts import Advance, array_writer, join_arrays, open_part, part_path
from orl_fast.shards import ShardIndex
from orl_fast.shards.writer import new_tar
from orl_fast.tables import BoxTable, PairTable, num_pairs

# One row per pair. Numbers of RoIs within their images; the cosine as float32.
PAIR = np.dtype([("query_roi", "<i2"), ("partner_roi", "<i2"), ("similarity", "<f4")])
_MAGNITUDE = 0x7FFFFFFF


class RoiFeatures:
    """Features of RoIs, read from the shards' memory-mapped files: `of(i)` is [R, C] float16 of unit length."""

    def __init__(self, folder: Path, index: ShardIndex, rois: BoxTable) -> None:
        self._index, self._rois = index, rois
        self._part = lru_cache(maxsize=256)(partial(open_part, folder, "roi-features"))  # a map holds a descriptor

    def of(self, image: int) -> NDArray[np.float16]:
        shard = int(self._index.shard_ids[image])
        start, stop = self._rois.offsets[image : image + 2] - self._rois.offsets[self._index.shard_rows(shard).start]
        return self._part(shard)[start:stop]


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

    def mine(self, shards: Sequence[int], advance: Advance) -> None:
        """Write pairs-NNNNNN.npy, [T] of PAIR, for some shards."""
        for shard in shards:
            with array_writer(part_path(self.folder, "pairs", shard)) as write:
                for image in self.index.shard_rows(shard):
                    query, partners = self.features.of(image), [self.features.of(row) for row in self.neighbors[image].tolist()]
                    found = top_pairs(query, partners, pair_ratio=self.pair_ratio, compat=self.compat, device=self.device)
                    write(np.concatenate(found))
                    advance(1)

    def join(self) -> None:
        """Write the arrays of the PairTable, and pairs-NNNNNN.tar beside them."""
        folder, shards = self.folder, range(self.index.num_shards)
        counts = [self._counts(self.index.shard_rows(shard)) for shard in shards]
        starts = np.cumsum([0, *(count.sum() for count in counts)])
        firsts = (start + np.cumsum(count).reshape(count.shape) - count for start, count in zip(starts, counts, strict=False))
        write_array(folder / "neighbors.npy", self.neighbors)
        join_arrays(folder / "first.npy", firsts)
        join_arrays(folder / "count.npy", counts)
        for array, column in (("query_roi", "query_roi"), ("partner_roi", "partner_roi"), ("similarities", "similarity")):
            join_arrays(folder / f"{array}.npy", (open_part(folder, "pairs", shard)[column] for shard in shards))
        write_pair_shards(folder, index=self.index, rois=self.rois, pairs=PairTable.open(folder))

    def _counts(self, images: range) -> NDArray[np.int32]:
        """[n, K]: pairs of each image of a shard with each of its neighbors."""
        ends, neighbors = self.rois.offsets, self.neighbors[images.start : images.stop]
        queries, partners = np.diff(ends[images.start : images.stop + 1]), ends[neighbors + 1] - ends[neighbors]
        return num_pairs(queries[:, None], partners, pair_ratio=self.pair_ratio, compat=self.compat).astype(np.int32)


def write_pair_shards(folder: Path, *, index: ShardIndex, rois: BoxTable, pairs: PairTable) -> None:
    """Write pairs-NNNNNN.tar: the mined components of each sample of images-NNNNNN.tar, under the same keys, in the same order.

    {key}.rois.npy [R, 4] int16; {key}.neighbors.npy [K] int64, rows; {key}.pairs.npy [n, 9] int32: which neighbor, the query's box, the
    partner's box (xyxy), by neighbor, best first; {key}.similarity.npy [n] float32.
    """
    for shard in range(index.num_shards):
        with new_tar(folder / index.shard_paths[shard].name.replace("images", "pairs")) as add:
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
