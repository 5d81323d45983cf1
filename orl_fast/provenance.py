"""What a mined table was made from, and where tables are stored: `mined/KIND`, and those of other settings in `mined/KIND@FINGERPRINT`.

A table folder holds `table.json` and its arrays. The fingerprint digests the kind, the settings and the fingerprints of the inputs; every
step is deterministic up to the rounding of floats, so equal fingerprints mean interchangeable content. A folder that is still being filled
holds `unfinished.json` instead. Finished tables and unfinished work are renamed, never removed.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orl_fast.config import digest
from orl_fast.console import log
from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.files import atomic_folder, sync_folder, write_json

FORMAT_VERSION = 1
TABLE, UNFINISHED = "table.json", "unfinished.json"


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


def write_info(folder: Path, info: TableInfo, *, name: str = TABLE) -> None:
    """Write table.json, last of all, into a folder that holds the table's arrays; or unfinished.json before them."""
    about = {"format": FORMAT_VERSION, "kind": info.kind, "fingerprint": info.fingerprint}
    write_json(folder / name, about | {"made_from": dict(info.made_from), "settings": dict(info.settings)})


def table_info(path: Path, *, name: str = TABLE) -> TableInfo | None:
    """The provenance of a finished table (or, by name, of an unfinished one); None where there is none.

    Raises:
        DataError: the file is damaged or of another format version.
    """
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
    """The provenance of a table that must exist, be of this kind, and be made from these inputs.

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


def find_table(mined: Path, kind: str, fingerprint: str) -> Path | None:
    """The folder of the finished table with this fingerprint, current or aside; None where there is none."""
    for path in (mined / kind, mined / f"{kind}@{fingerprint}"):
        info = table_info(path)
        if info is not None and info.fingerprint == fingerprint:
            return path
    return None


def tables_of(mined: Path, kind: str) -> Iterator[TableInfo]:
    """The finished tables of a kind: the current one first."""
    for path in (mined / kind, *sorted(mined.glob(f"{kind}@*"))):
        info = table_info(path)
        if info is not None:
            yield info


def activate(path: Path, fingerprint: str) -> None:
    """Make `path`, mined/KIND, the folder with this fingerprint where there is one; otherwise leave its place free.

    The folder in its place moves aside, to PATH@FINGERPRINT; one that was moved there earlier moves back. A run killed between the two
    leaves both where `find_table` finds them.

    Raises:
        DataError: something else is in a place that is needed.
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
