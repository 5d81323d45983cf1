"""`orl-fast bench`: run a benchmark against its baselines, print the table, write JSON and a picture."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import click

import orl_fast
from orl_fast.errors import DataError

NAMES = ("proposals", "filter", "neighbors", "mine", "loader", "shard", "step")


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "all"]))
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Result [default: bench-results/NAME.json].")
@click.option("--quick", is_flag=True, help="Smaller inputs and fewer rounds: a quick run, not for reporting.")
def command(name: str, source: Path | None, json_path: Path | None, quick: bool) -> None:
    """Measure NAME against its baselines, alternating, in one run.

    SOURCE is a folder of photographs or of packed shards; without it, synthetic photographs are used. A picture is written next to the JSON
    file where matplotlib is installed.
    """
    if source is not None and not source.is_dir():
        raise DataError(f"{source}: no such folder; name a folder of photographs or of packed shards")
    home = Path(orl_fast.__file__).parent.parent  # a checkout, or an installed package with a copy
    folders = [str(folder) for folder in (home / "benchmarks", home / "orl_fast_benchmarks") if (folder / "harness.py").is_file()]
    if not folders:
        raise DataError(f"{home}: the benchmarks are not installed with the package; run from a checkout of the repository")
    if "benchmarks" not in sys.modules:
        sys.modules["benchmarks"] = ModuleType("benchmarks")
        sys.modules["benchmarks"].__path__ = folders
    for one in NAMES if name == "all" else (name,):
        path = json_path or Path("bench-results") / f"{one}.json"
        if name == "all" and json_path is not None:
            path = json_path.with_name(f"{json_path.stem}-{one}{json_path.suffix}")
        importlib.import_module("benchmarks.harness").report(one, source, path, quick=quick)
