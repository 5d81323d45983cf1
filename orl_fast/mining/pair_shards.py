"""Mined pairs as WebDataset shards next to the images' shards, for readers of that format."""

import io
from pathlib import Path

import numpy as np

from orl_fast.shards import ShardIndex
from orl_fast.shards.writer import new_tar
from orl_fast.tables import BoxTable, PairTable


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
