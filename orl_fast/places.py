"""Default locations: shards/NAME, shards/NAME/mined, runs/NAME/METHOD."""

from pathlib import Path

from orl_fast.checkpoint import CHECKPOINT, read_header
from orl_fast.errors import DataError
from orl_fast.shards.index import MANIFEST_NAME

SHARDS_HOME = Path("shards")
RUNS_HOME = Path("runs")


def default_shards(given: Path | None = None) -> Path:
    """The shard folder to use: the one given (a path, or a name below shards/), else the only one below ./shards; DataError if not one."""
    if given is not None:
        if (given / MANIFEST_NAME).is_file() or not (SHARDS_HOME / given / MANIFEST_NAME).is_file():
            return given
        return SHARDS_HOME / given
    found = sorted(entry.parent for entry in SHARDS_HOME.glob(f"*/{MANIFEST_NAME}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{SHARDS_HOME}/ holds several data sets ({', '.join(p.name for p in found)}); name the one to use")
    raise DataError(f"{SHARDS_HOME.absolute()}: no packed images here; run orl-fast shard FOLDER first, or name a shard folder")


def mined_folder(shards: Path) -> Path:
    """The tables of stage 2 of a shard folder."""
    return shards / "mined"


def run_folder(shards: Path, method: str) -> Path:
    """The run of a method on a shard folder: runs/NAME/METHOD."""
    return RUNS_HOME / shards.resolve().name / method


def stage_1_checkpoint(shards: Path) -> Path:
    """The checkpoint to mine with: BYOL's or, where there is none, that of the only run that draws no mined pairs. It need not exist.

    DataError if there are several such runs.
    """
    byol = run_folder(shards, "byol") / CHECKPOINT
    others = [path for path in sorted(byol.parent.parent.glob(f"*/{CHECKPOINT}")) if not byol.exists() and not read_header(path)["mined"]]
    if len(others) > 1:
        raise DataError(f"{byol.parent.parent}: several runs can be mined with; choose with --checkpoint {others[0]}")
    return others[0] if others else byol
