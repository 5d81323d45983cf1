"""The format of mined tables: a folder of memory-mapped .npy arrays. Row i is image i of the shard index."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from orl_fast.config import Variant
from orl_fast.errors import DataError, StaleError
from orl_fast.files import write_array

_INT16 = np.iinfo(np.int16)


def open_array(folder: Path, name: str) -> NDArray[Any]:
    """Memory-map `name`.npy read-only, as a plain array (numba and torch take it without a copy).

    Raises:
        DataError: it is missing or damaged.
    """
    file = folder / f"{name}.npy"
    try:
        # An empty array cannot be mapped, and needs no mapping.
        array = np.load(file, mmap_mode=None if file.stat().st_size < 4096 else "r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); remove {folder} and run the step again") from error
    return np.asarray(array)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table whose fields are its arrays: one file each, under the field's name."""

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(**{field.name: open_array(path, field.name) for field in fields(cls)})

    def write_arrays(self, folder: Path) -> None:
        """Write the arrays into the folder that `orl_fast.provenance.new_table` gave; each is synced to disk."""
        for field in fields(self):
            write_array(folder / f"{field.name}.npy", getattr(self, field.name))


@dataclass(frozen=True, kw_only=True)
class NeighborTable(_Table):
    """The K nearest other images of each image, best first.

    Attributes:
        neighbors: [N, K] int64 rows.
        similarities: [N, K] float32 cosines.
    """

    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class BoxTable(_Table):
    """Boxes of each image, in order: raw proposals, or the RoIs kept of them.

    Attributes:
        offsets: [N + 1] int64; image i has boxes[offsets[i] : offsets[i + 1]].
        boxes: [T, 4] int16 xyxy, half-open, pixels of the decoded image.
    """

    offsets: NDArray[np.int64]
    boxes: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, image: int) -> NDArray[np.int16]:
        """[R, 4] int16: the boxes of one image."""
        return self.boxes[self.offsets[image] : self.offsets[image + 1]]

    def num_of(self, images: range) -> int:
        """Boxes of consecutive images together."""
        return int(self.offsets[images.stop] - self.offsets[images.start])

    @property
    def counts(self) -> NDArray[np.int64]:
        """[N] int64: boxes per image."""
        return np.diff(self.offsets)

    @classmethod
    def from_lists(cls, boxes: Sequence[NDArray[Any]]) -> "BoxTable":
        """Join per-image [R, 4] arrays of integers.

        Raises:
            ValueError: a box does not fit into int16.
        """
        offsets = np.zeros(len(boxes) + 1, np.int64)
        np.cumsum([len(entry) for entry in boxes], out=offsets[1:])
        joined = np.concatenate([np.empty((0, 4), np.int16), *boxes])
        if len(joined) and (joined.min() < _INT16.min or joined.max() > _INT16.max):
            raise ValueError(f"boxes reach from {joined.min()} to {joined.max()}; int16 holds {_INT16.min} to {_INT16.max}")
        return cls(offsets=offsets, boxes=joined.astype(np.int16))


@dataclass(frozen=True, kw_only=True)
class PairTable(_Table):
    """Corresponding RoIs of each image and each of its neighbors, best first.

    A pair is two RoI numbers, counted within their images. Entry (i, k) owns the rows first[i, k] … first[i, k] + count[i, k] - 1.

    Attributes:
        neighbors: [N, K] int64 rows.
        first: [N, K] int64; count: [N, K] int32, at least 1.
        query_roi: [T] int16, RoI of image i; partner_roi: [T] int16, RoI of the neighbor.
        similarities: [T] float32 cosines.
    """

    neighbors: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int32]
    query_roi: NDArray[np.int16]
    partner_roi: NDArray[np.int16]
    similarities: NDArray[np.float32]

    def limited(self, rois: BoxTable, *, num_neighbors: int, pair_ratio: float, variant: Variant) -> "PairTable":
        """The table that these settings would have given: the first neighbors of each image, and the first pairs with each.

        Raises:
            StaleError: it was mined with fewer neighbors or pairs than these settings give.
        """
        neighbors, first = np.ascontiguousarray(self.neighbors[:, :num_neighbors]), np.ascontiguousarray(self.first[:, :num_neighbors])
        wanted = num_pairs(rois.counts[:, None], rois.counts[neighbors], pair_ratio=pair_ratio, variant=variant)
        found = self.count[:, :num_neighbors]
        if num_neighbors > neighbors.shape[1] or (wanted > found).any():
            settings = f"{num_neighbors} neighbors and the pair ratio {pair_ratio:g} ({variant}) need more pairs than were mined"
            remedy = f"run orl-fast mine --neighbors {num_neighbors} --pair-ratio {pair_ratio:g} --variant {variant}"
            raise StaleError(f"pairs: {settings}, {self.neighbors.shape[1]} neighbors with {self.count.mean():.4g} pairs each; {remedy}")
        return replace(self, neighbors=neighbors, first=first, count=wanted.astype(np.int32))


def num_pairs(num_query: Any, num_partner: Any, *, pair_ratio: float, variant: Variant) -> NDArray[np.int64]:
    """How many pairs an (image, neighbor) entry keeps: elementwise over RoI counts, at least 1, at most all.

    official: max(1, int(ratio * R)); paper (section 3.2): max(1, int(ratio * R * R')).
    """
    query, partner = np.broadcast_arrays(np.asarray(num_query, np.int64), num_partner)
    base = query if variant == "official" else query * partner
    kept: NDArray[np.int64] = np.clip((pair_ratio * base).astype(np.int64), 1, query * partner)
    return kept
