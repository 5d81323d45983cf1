"""Corresponding RoIs: the most similar RoI pairs of each image and each of its neighbors (paper, section 3.2, stage 2 iii).

Cosines are products of halves, which float64 sums without rounding, rounded to float32 once. So the order of pairs depends on neither
blocks nor threads nor the device; of equal cosines the first in the matrix leads: by the query's RoI, then the partner's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.config import Variant
from orl_fast.files import write_array
from orl_fast.mining.pair_shards import write_pair_shards
from orl_fast.mining.parts import array_writer, join_arrays, open_part, part_path
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, PairTable, num_pairs

# One row per pair. Numbers of RoIs within their images; the cosine as float32.
PAIR = np.dtype([("query_roi", "<i2"), ("partner_roi", "<i2"), ("similarity", "<f4")])


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
    """Finds the pairs of whole shards and joins them into a table and column shards. `mine` is a worker of an executor.

    Attributes:
        folder: the pair table. features: the folder of the RoIs' features. neighbors: [N, K] int64.
    """

    folder: Path
    features: Path
    index: ShardIndex
    rois: BoxTable
    neighbors: NDArray[np.int64]
    pair_ratio: float
    variant: Variant

    def mine(self, shards: Iterable[int], device: torch.device, num_threads: int) -> Iterator[int]:
        """Write pairs-NNNNNN.npy, [T] of PAIR, for some shards; yield how many images are done."""
        del num_threads
        features = RoiFeatures(self.features, self.index, self.rois)
        for shard in shards:
            with array_writer(part_path(self.folder, "pairs", shard)) as write:
                for image in self.index.shard_rows(shard):
                    query, partners = features.of(image), [features.of(row) for row in self.neighbors[image].tolist()]
                    found = top_pairs(query, partners, pair_ratio=self.pair_ratio, variant=self.variant, device=device)
                    write(np.concatenate(found))
                    yield 1

    def join(self) -> None:
        """Write the arrays of the PairTable, and pairs-NNNNNN.tar next to them."""
        counts = self.rois.counts
        count = num_pairs(counts[:, None], counts[self.neighbors], pair_ratio=self.pair_ratio, variant=self.variant)
        write_array(self.folder / "neighbors.npy", self.neighbors)
        write_array(self.folder / "first.npy", np.cumsum(count).reshape(count.shape) - count)
        write_array(self.folder / "count.npy", count.astype(np.int32))
        for name, column in (("query_roi", "query_roi"), ("partner_roi", "partner_roi"), ("similarities", "similarity")):
            found = (open_part(self.folder, "pairs", shard)[column] for shard in range(self.index.num_shards))
            join_arrays(self.folder / f"{name}.npy", found)
        write_pair_shards(self.folder, index=self.index, rois=self.rois, pairs=PairTable.open(self.folder))
