"""`orl-fast bench`: run a benchmark against its baselines, print the table, write JSON and a picture."""

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import click

import orl_fast
from orl_fast.errors import DataError

NAMES = ("proposals", "filter", "neighbors", "mine", "loader", "shard", "step")


def _step_time(_context: click.Context, _option: click.Parameter, value: str | None) -> float | Literal["auto"] | None:
    if value is None:
        return None
    if value == "auto":
        return "auto"
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise click.BadParameter(f"{value!r}: a time above 0 in milliseconds, or auto")
    return milliseconds


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "all"]))
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Result [default: bench-results/NAME.json, step-ms.json]."
)
@click.option(
    "--step-ms",
    metavar="MS|auto",
    callback=_step_time,
    help="With `step`: feed a step that takes this time of an accelerator and no core, and report how long it waits for data, by number of "
    "cores. auto: a batch's time on an H100, of which 16 cores feed one, estimated at 950 images/s.",
)
@click.option("--batch", type=click.IntRange(min=2), help="With --step-ms: images per step [default: 64; 32 with --quick].")
@click.option("--quick", is_flag=True, help="Smaller inputs and fewer rounds: a quick run, not for reporting.")
def command(
    name: str, source: Path | None, json_path: Path | None, step_ms: float | Literal["auto"] | None, batch: int | None, quick: bool
) -> None:
    """Measure NAME against its baselines, alternating, in one run.

    SOURCE is a folder of photographs or of packed shards; without it, synthetic photographs are used. A picture is written next to the JSON
    file where matplotlib is installed.
    """
    if step_ms is not None and name != "step":
        raise click.UsageError(f"--step-ms goes with the benchmark step, not with {name}")
    if batch is not None and step_ms is None:
        raise click.UsageError("--batch goes with --step-ms")
    if source is not None and not source.is_dir():
        raise DataError(f"{source}: no such folder; name a folder of photographs or of packed shards")
    home = Path(orl_fast.__file__).parent.parent  # a checkout, or an installed package with a copy
    folders = [str(folder) for folder in (home / "benchmarks", home / "orl_fast_benchmarks") if (folder / "harness.py").is_file()]
    if not folders:
        raise DataError(f"{home}: the benchmarks are not installed with the package; run from a checkout of the repository")
    if "benchmarks" not in sys.modules:
        sys.modules["benchmarks"] = ModuleType("benchmarks")
        sys.modules["benchmarks"].__path__ = folders
    if step_ms is not None:
        path, time_ms = json_path or Path("bench-results/step-ms.json"), None if step_ms == "auto" else step_ms
        importlib.import_module("benchmarks.rehearsal").report(source, path, step_ms=time_ms, batch=batch, quick=quick)
        return
    for one in NAMES if name == "all" else (name,):
        path = json_path or Path("bench-results") / f"{one}.json"
        if name == "all" and json_path is not None:
            path = json_path.with_name(f"{json_path.stem}-{one}{json_path.suffix}")
        importlib.import_module("benchmarks.harness").report(one, source, path, quick=quick)
