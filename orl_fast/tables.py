"""The mined tables: memory-mapped arrays, one folder each, that know what they were made from.

A table folder holds `table.json` and its arrays as .npy. Row i is image i of the shard index. The fingerprint digests the kind, the
settings and the fingerprints of the inputs; since every stage is deterministic, equal fingerprints mean equal content, and a table whose
inputs have changed is refused.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from orl_fast.config import Compat, digest
from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.files import atomic_folder, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TableInfo:
    """What a table is and what it was made from.

    Attributes:
        kind: "neighbors", "proposals", "rois", "pairs", …
        made_from: fingerprint of each input, by name ("index", "encoder", "rois", …).
        settings: the numbers that shaped it.
    """

    kind: str
    made_from: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest([FORMAT_VERSION, self.kind, dict(self.made_from), dict(self.settings)])


@contextmanager
def new_table(path: Path, info: TableInfo) -> Iterator[Path]:
    """Yield a folder to write arrays into; it becomes the table `path` only when the block ends well."""
    with atomic_folder(path) as folder:
        yield folder
        write_info(folder, info)


def write_info(folder: Path, info: TableInfo) -> None:
    """Write table.json, last of all, into a folder that holds the table's arrays."""
    about = {"format": FORMAT_VERSION, "kind": info.kind, "fingerprint": info.fingerprint}
    write_json(folder / "table.json", about | {"made_from": dict(info.made_from), "settings": dict(info.settings)})


def table_info(path: Path) -> TableInfo | None:
    """What the table folder says of itself; None where there is no whole table.

    Raises:
        DataError: table.json is damaged or of another format version.
    """
    file = path / "table.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        version, info = values["format"], TableInfo(kind=values["kind"], made_from=values["made_from"], settings=values["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged ({error}); remove the folder and run the stage again") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: table format {version}, this version reads {FORMAT_VERSION}; remove the folder and mine again")
    return info


def open_info(path: Path, kind: str, *, made_from: Mapping[str, str], remedy: str) -> TableInfo:
    """The info of a table that must be there, of this kind, and made from these inputs.

    Args:
        made_from: the fingerprints to compare. remedy: the command that makes the table.
    Raises:
        MissingStageError: no such table. StaleError: made from other inputs. DataError: damaged.
    """
    info = table_info(path)
    if info is None:
        raise MissingStageError(f"{path}: there is no {kind} table; run {remedy}")
    if info.kind != kind:
        raise DataError(f"{path}: holds a {info.kind} table, a {kind} table was expected; run {remedy}")
    for name, expected in made_from.items():
        found = info.made_from.get(name)
        if found != expected:
            raise StaleError(f"{path}: made from {name} {found}, this run uses {expected}; run {remedy}")
    return info


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
        raise DataError(f"{file}: cannot be read ({error}); remove {folder} and run the stage again") from error
    return np.asarray(array)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table whose fields are its arrays: one file each, under the field's name."""

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(**{field.name: open_array(path, field.name) for field in fields(cls)})

    def write_arrays(self, folder: Path) -> None:
        """Write the arrays into the folder that `new_table` gave."""
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    def save(self, path: Path, info: TableInfo) -> None:
        """Write the table; atomic."""
        with new_table(path, info) as folder:
            self.write_arrays(folder)


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
    def from_lists(cls, boxes: list[NDArray[np.int16]]) -> "BoxTable":
        """Join per-image [R, 4] arrays."""
        offsets = np.zeros(len(boxes) + 1, np.int64)
        np.cumsum([len(entry) for entry in boxes], out=offsets[1:])
        return cls(offsets=offsets, boxes=np.concatenate([np.empty((0, 4), np.int16), *boxes], dtype=np.int16, casting="unsafe"))


RoiTable = BoxTable


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

    def limited(self, rois: RoiTable, *, num_neighbors: int, pair_ratio: float, compat: Compat = "official") -> "PairTable":
        """The table that fewer neighbors and a smaller pair ratio would have given: prefixes of this one.

        Raises:
            StaleError: it was mined with fewer neighbors than asked for.
        """
        found = self.neighbors.shape[1]
        if num_neighbors > found:
            needs = f"mined with {found} neighbors, {num_neighbors} are asked for"
            raise StaleError(f"pairs: {needs}; run orl-fast mine --neighbors {num_neighbors}")
        neighbors, first = np.ascontiguousarray(self.neighbors[:, :num_neighbors]), np.ascontiguousarray(self.first[:, :num_neighbors])
        wanted = num_pairs(rois.counts[:, None], rois.counts[neighbors], pair_ratio=pair_ratio, compat=compat)
        count = np.minimum(self.count[:, :num_neighbors], wanted).astype(np.int32)
        return replace(self, neighbors=neighbors, first=first, count=count)


def num_pairs(num_query: Any, num_partner: Any, *, pair_ratio: float, compat: Compat) -> NDArray[np.int64]:
    """How many pairs an (image, neighbor) entry keeps: elementwise over RoI counts, at least 1, at most all.

    official: max(1, int(ratio * R)); paper (section 3.2): max(1, int(ratio * R * R')).
    """
    query, partner = np.broadcast_arrays(np.asarray(num_query, np.int64), num_partner)
    base = query if compat == "official" else query * partner
    kept: NDArray[np.int64] = np.clip((pair_ratio * base).astype(np.int64), 1, query * partner)
    return kept
