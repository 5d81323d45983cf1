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
@click.option("--quick", is_flag=True, help="Smaller inputs and fewer rounds: a look, not a figure to quote.")
def command(name: str, source: Path | None, json_path: Path | None, quick: bool) -> None:
    """Measure NAME against its baselines, in turn, in one run.

    SOURCE is a folder of photographs or of packed shards; without it, photographs are drawn. The picture is written beside the JSON file.
    """
    if source is not None and not source.is_dir():
        raise DataError(f"{source}: no such folder; name a folder of photographs or of packed shards")
    for one in NAMES if name == "all" else (name,):
        path = json_path or Path("bench-results") / f"{one}.json"
        if name == "all" and json_path is not None:
            path = json_path.with_name(f"{json_path.stem}-{one}{json_path.suffix}")
        _run(one, source, path, quick=quick)


def _run(name: str, source: Path | None, json_path: Path, *, quick: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    harness, bench = _load("harness"), _load(f"bench_{name}")
    title = f"orl-fast bench {name}" + (" --quick" if quick else "")
    rows = bench.run(source, quick=quick)
    table = Table("", "rate (median)", "spread (IQR)", "ratio", title=title, title_justify="left")
    group = None
    for row in rows:
        if row.group and row.group != group:
            table.add_section()
            table.add_row(f"[bold]{row.group}", "", "", "")
        group = row.group
        table.add_row(row.name, f"{row.median:,.4g} {row.unit}", f"{row.iqr:,.3g}", f"{row.ratio:.2f}× ± {row.ratio_iqr / 2:.2f}")
    screen = Console()
    Console(width=max(screen.width, 110)).print(table)  # what is piped into a file need not be narrow
    harness.save_json(json_path, harness.result(title, rows))
    harness.save_plot(json_path.with_suffix(".png"), title, rows)
    click.echo(f"written: {json_path}, {json_path.with_suffix('.png')}")


def _load(module: str) -> ModuleType:
    """Import from the benchmarks/ of a checkout, or from its copy in an installed package; they import each other as `benchmarks.…`."""
    home = Path(orl_fast.__file__).parent.parent
    folders = [str(folder) for folder in (home / "benchmarks", home / "orl_fast_benchmarks") if (folder / "harness.py").is_file()]
    if not folders:
        raise DataError(f"{home}: the benchmarks are not installed beside the package; run from a checkout of the repository")
    if "benchmarks" not in sys.modules:
        package = sys.modules["benchmarks"] = ModuleType("benchmarks")
        package.__path__ = folders
    return importlib.import_module(f"benchmarks.{module}")
