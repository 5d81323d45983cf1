"""The mined tables: memory-mapped arrays, one folder each, that know what they were made from.

A table folder holds `table.json` and its arrays as .npy. Row i is image i of the shard index. CSR tables hold image i's
entries in `values[offsets[i] : offsets[i + 1]]`. The fingerprint digests the kind, the settings and the fingerprints of the inputs; since
every stage is deterministic, equal fingerprints mean equal content, and a table whose inputs have changed is refused.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    about = {"kind": info.kind, "fingerprint": info.fingerprint, "made_from": dict(info.made_from), "settings": dict(info.settings)}
    write_json(folder / "table.json", {"format": FORMAT_VERSION, **about})


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
        made_from: the fingerprints it must carry; inputs not named are not compared.
        remedy: the command that makes it.
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
class NeighborTable:
    """The K nearest other images of each image, best first.

    Attributes:
        neighbors: [N, K] int64 rows.
        similarities: [N, K] float32 cosines.
    """

    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]

    @classmethod
    def open(cls, path: Path) -> "NeighborTable":
        return cls(neighbors=open_array(path, "neighbors"), similarities=open_array(path, "similarities"))

    def save(self, path: Path, info: TableInfo) -> None:
        """Write the table; atomic."""
        with new_table(path, info) as folder:
            np.save(folder / "neighbors.npy", self.neighbors)
            np.save(folder / "similarities.npy", self.similarities)


@dataclass(frozen=True, kw_only=True)
class BoxTable:
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
    def open(cls, path: Path) -> "BoxTable":
        return cls(offsets=open_array(path, "offsets"), boxes=open_array(path, "boxes"))

    @classmethod
    def from_lists(cls, boxes: list[NDArray[np.int16]]) -> "BoxTable":
        """Join per-image [R, 4] arrays."""
        offsets = np.zeros(len(boxes) + 1, np.int64)
        np.cumsum([len(entry) for entry in boxes], out=offsets[1:])
        joined = np.concatenate(boxes).astype(np.int16) if boxes else np.empty((0, 4), np.int16)
        return cls(offsets=offsets, boxes=joined.reshape(-1, 4))


RoiTable = BoxTable


@dataclass(frozen=True, kw_only=True)
class PairTable:
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

    _ARRAYS = ("neighbors", "first", "count", "query_roi", "partner_roi", "similarities")

    @classmethod
    def open(cls, path: Path) -> "PairTable":
        arrays = {name: open_array(path, name) for name in cls._ARRAYS}
        return cls(**arrays)

    def write_arrays(self, folder: Path) -> None:
        """Write the arrays into the folder that `new_table` gave."""
        for name in self._ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    def limited(self, rois: RoiTable, *, num_neighbors: int, pair_ratio: float, compat: Compat = "official") -> "PairTable":
        """The table that fewer neighbors and a smaller pair ratio would have given: prefixes of this one.

        Raises:
            StaleError: it was mined with fewer neighbors than asked for.
        """
        found = self.neighbors.shape[1]
        if num_neighbors > found:
            raise StaleError(
                f"pairs: mined with {found} neighbors, {num_neighbors} are asked for; run orl-fast mine --neighbors {num_neighbors}"
            )
        neighbors = self.neighbors[:, :num_neighbors]
        wanted = num_pairs(rois.counts[:, None], rois.counts[neighbors], pair_ratio=pair_ratio, compat=compat)
        count = np.minimum(self.count[:, :num_neighbors], wanted).astype(np.int32)
        return PairTable(
            neighbors=np.ascontiguousarray(neighbors),
            first=np.ascontiguousarray(self.first[:, :num_neighbors]),
            count=count,
            query_roi=self.query_roi,
            partner_roi=self.partner_roi,
            similarities=self.similarities,
        )


def num_pairs(num_query: Any, num_partner: Any, *, pair_ratio: float, compat: Compat) -> NDArray[np.int64]:
    """How many pairs an (image, neighbor) entry keeps: elementwise over RoI counts, at least 1, at most all.

    official: max(1, int(ratio * R)); paper (section 3.2): max(1, int(ratio * R * R')).
    """
    query, partner = np.asarray(num_query, np.int64), np.asarray(num_partner, np.int64)
    base = query * np.ones_like(partner) if compat == "official" else query * partner
    wanted = np.maximum(1, (pair_ratio * base).astype(np.int64))
    kept: NDArray[np.int64] = np.minimum(wanted, query * partner)
    return kept
