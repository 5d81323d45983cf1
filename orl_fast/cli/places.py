"""Where things lie when a command is not told: shards/NAME, shards/NAME/mined, runs/NAME/METHOD."""

from pathlib import Path

from orl_fast.errors import DataError

SHARDS_HOME = Path("shards")
RUNS_HOME = Path("runs")
MANIFEST = "manifest.json"


def default_shards(given: Path | None = None) -> Path:
    """The packed folder to use: the one given (a path, or a name below shards/), else the only one below ./shards.

    Raises:
        DataError: there is none, or there are several.
    """
    if given is not None:
        if (given / MANIFEST).is_file() or not (SHARDS_HOME / given / MANIFEST).is_file():
            return given
        return SHARDS_HOME / given
    found = sorted(entry.parent for entry in SHARDS_HOME.glob(f"*/{MANIFEST}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{SHARDS_HOME}/ holds several packed folders ({', '.join(p.name for p in found)}); name the one to use")
    raise DataError(f"{SHARDS_HOME.absolute()}: no packed photographs here; run orl-fast shard FOLDER first, or name a packed folder")


def mined_folder(shards: Path) -> Path:
    """The tables of stage 2 of a packed folder."""
    return shards / "mined"


def run_folder(shards: Path, method: str) -> Path:
    """The run of a method on a packed folder: runs/NAME/METHOD."""
    return RUNS_HOME / shards.resolve().name / method


def default_checkpoint(shards: Path, method: str) -> Path:
    """The latest checkpoint of that run, which need not exist."""
    return run_folder(shards, method) / "checkpoint.pt"
