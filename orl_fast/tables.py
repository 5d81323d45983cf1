"""Mined tables: folders of memory-mapped .npy arrays, and what they were made from. Row i is image i of the shard index.

They are in `mined/KIND`, those of other settings as `mined/KIND@FINGERPRINT`. A table folder holds its arrays and `table.json`; while
it is being filled, `unfinished.json` instead. Both are renamed, never removed. The fingerprint digests the kind, the settings and the
fingerprints of the inputs; steps are deterministic up to rounding, so equal fingerprints mean interchangeable content.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from orl_fast.config import Variant, digest
from orl_fast.console import log
from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.files import atomic_folder, sync_folder, write_array, write_json

FORMAT_VERSION = 1
TABLE, UNFINISHED = "table.json", "unfinished.json"
_INT16 = np.iinfo(np.int16)


def open_array(folder: Path, name: str) -> NDArray[Any]:
    """Memory-map `name`.npy read-only, as a plain array (numba and torch take it without a copy). DataError if missing or damaged."""
    file = folder / f"{name}.npy"
    try:
        # An empty array cannot be mapped, and needs no mapping.
        array = np.load(file, mmap_mode=None if file.stat().st_size < 4096 else "r", allow_pickle=False)
    except Exception as error:  # NumPy's parser of headers raises anything at all on garbage
        raise DataError(f"{file}: cannot be read ({error}); remove {folder} and run the step again") from error
    return np.asarray(array)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table whose fields are its arrays: one file each, under the field's name."""

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(**{field.name: open_array(path, field.name) for field in fields(cls)})

    def write_arrays(self, folder: Path) -> None:
        """Write the arrays into the folder that `new_table` gave; each is synced to disk."""
        for field in fields(self):
            write_array(folder / f"{field.name}.npy", getattr(self, field.name))


@dataclass(frozen=True, kw_only=True)
class NeighborTable(_Table):
    """The K nearest other images of each image, best first."""

    neighbors: NDArray[np.int64]  # [N, K] rows
    similarities: NDArray[np.float32]  # [N, K] cosines


@dataclass(frozen=True, kw_only=True)
class BoxTable(_Table):
    """Boxes of each image, in order: raw proposals, or the RoIs kept of them."""

    offsets: NDArray[np.int64]  # [N + 1]; image i has boxes[offsets[i] : offsets[i + 1]]
    boxes: NDArray[np.int16]  # [T, 4] xyxy, half-open, pixels of the decoded image

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
        """Join per-image [R, 4] arrays of integers; ValueError if a box does not fit into int16."""
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
    """

    neighbors: NDArray[np.int64]  # [N, K] rows
    first: NDArray[np.int64]  # [N, K]
    count: NDArray[np.int32]  # [N, K], at least 1
    query_roi: NDArray[np.int16]  # [T], RoI of image i
    partner_roi: NDArray[np.int16]  # [T], RoI of the neighbor
    similarities: NDArray[np.float32]  # [T] cosines

    def limited(self, rois: BoxTable, *, num_neighbors: int, pair_ratio: float, variant: Variant) -> "PairTable":
        """The table that these settings would have given: the first neighbors of each image, and the first pairs with each.

        StaleError if it was mined with fewer neighbors or pairs than these settings give.
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
    return np.clip((pair_ratio * base).astype(np.int64), 1, query * partner)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class TableInfo:
    """What a table is and what it was made from."""

    kind: str  # "neighbors", "proposals", "rois", "pairs", …
    made_from: Mapping[str, str]  # fingerprint of each input, by name ("index", "encoder", "rois", …)
    settings: Mapping[str, Any]  # the numbers that shaped it

    @property
    def fingerprint(self) -> str:
        return digest([FORMAT_VERSION, self.kind, dict(self.made_from), dict(self.settings)])


@contextmanager
def new_table(path: Path, info: TableInfo) -> Iterator[Path]:
    """Yield a folder to write arrays into; it becomes the table `path` only when the block ends well."""
    with atomic_folder(path) as folder:
        yield folder
        write_info(folder, info)


def write_info(folder: Path, info: TableInfo, *, name: str = TABLE) -> None:
    """Write table.json, last of all, into a folder that holds the table's arrays; or unfinished.json before them."""
    about = {"format": FORMAT_VERSION, "kind": info.kind, "fingerprint": info.fingerprint}
    write_json(folder / name, about | {"made_from": dict(info.made_from), "settings": dict(info.settings)})


def table_info(path: Path, *, name: str = TABLE) -> TableInfo | None:
    """The provenance of a finished table (or, by name, of an unfinished one), None where there is none; DataError if it cannot be read."""
    file = path / name
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        version, info = values["format"], TableInfo(kind=values["kind"], made_from=values["made_from"], settings=values["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged ({error}); remove the folder and run the step again") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: table format {version}, this version reads {FORMAT_VERSION}; remove the folder and mine again")
    return info


def open_info(path: Path, kind: str, *, made_from: Mapping[str, str], remedy: str) -> TableInfo:
    """The provenance of a table that must exist, be of this kind, and be made from inputs with these fingerprints.

    MissingStageError if there is none, StaleError if it was made from other inputs, DataError if damaged; they name the command `remedy`.
    """
    info = table_info(path)
    if info is None:
        raise MissingStageError(f"{path}: there is no {kind} table; run {remedy}")
    if info.kind != kind:
        raise DataError(f"{path}: holds a {info.kind} table, a {kind} table was expected; run {remedy}")
    for name, expected in made_from.items():
        if (found := info.made_from.get(name)) != expected:
            raise StaleError(f"{path}: made from {name} {found}, this run uses {expected}; run {remedy}")
    return info


def find_table(mined: Path, kind: str, fingerprint: str) -> Path | None:
    """The folder of the finished table with this fingerprint, current or aside; None where there is none."""
    for path in (mined / kind, mined / f"{kind}@{fingerprint}"):
        if (info := table_info(path)) and info.fingerprint == fingerprint:
            return path
    return None


def tables_of(mined: Path, kind: str) -> Iterator[TableInfo]:
    """The finished tables of a kind: the current one first."""
    for path in (mined / kind, *sorted(mined.glob(f"{kind}@*"))):
        if info := table_info(path):
            yield info


def activate(path: Path, fingerprint: str) -> None:
    """Make `path`, mined/KIND, the folder with this fingerprint where there is one; otherwise leave its place free.

    The folder in its place moves aside, to PATH@FINGERPRINT; one that was moved there earlier moves back. A run killed between the two
    leaves both where `find_table` finds them. DataError if something else is in a place that is needed.
    """
    former = table_info(path) or table_info(path, name=UNFINISHED)
    if former is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: holds no table of orl-fast; move it elsewhere")
    if former is not None and former.fingerprint == fingerprint:
        return
    if former is None or all(file.name == UNFINISHED or file.suffix == ".partial" for file in path.iterdir()):
        shutil.rmtree(path, ignore_errors=True)  # nothing was done yet
    else:
        aside = path.with_name(f"{path.name}@{former.fingerprint}")
        if aside.exists():
            raise DataError(f"{aside}: holds the same table as {path}; remove one of them")
        _rename(path, aside)
        log.info("%s: the former table is now %s; remove it if it is not needed", path.name, aside)
    back = path.with_name(f"{path.name}@{fingerprint}")
    if back.exists():
        _rename(back, path)
        log.info("%s: back from %s", path.name, back)


def _rename(old: Path, new: Path) -> None:
    old.rename(new)
    sync_folder(new.parent)
