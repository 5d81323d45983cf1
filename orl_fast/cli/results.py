"""`orl-fast results`: what all evaluations found, as one table."""

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from orl_fast.evals.results import Results


@click.command()
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1)
@click.option("--format", "kind", type=click.Choice(["text", "csv", "markdown"]), default="text", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead of printing.")
@click.option("--all", "every", is_flag=True, help="Every value, not only the main one of each evaluation.")
@click.option("--paper/--no-paper", default=True, show_default=True, help="The paper's rows (Tables 1 to 4) above yours.")
def command(paths: tuple[Path, ...], kind: str, out: Path | None, every: bool, paper: bool) -> None:
    """Show the values of all evaluations in one table, next to the paper's.

    PATHS are run folders, or folders above them [default: runs]. Each has an evals.jsonl once orl-fast eval was run on it. Values are in
    percent; of several records of one cell the latest is shown. A letter marks values that were measured with other options than the
    protocol's: compare these with one another alone.
    """
    from orl_fast.evals.results import as_csv, as_markdown, collect, read_records
    from orl_fast.files import atomic_file
    from orl_fast.places import RUNS_HOME

    results = collect(read_records(paths or (RUNS_HOME,)), paper=paper, every=every)
    text = {"text": _as_text, "csv": as_csv, "markdown": as_markdown}[kind](results)
    if out is None:
        click.echo(text, nl=False)
        return
    with atomic_file(out) as file:
        file.write(text.encode())
    click.echo(f"written: {out}")


def _as_text(results: "Results") -> str:
    """A table as wide as the terminal; columns that do not fit follow below, with the backbones again."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from orl_fast.evals.results import cells

    headings, rows, notes = cells(results)
    columns = [column for column in zip(headings, *rows, strict=True) if any(column[1:])]
    whole = [column[0] in headings[:3] for column in columns]  # text, on one line; the headings of values may be broken
    widths = [
        2 + max(map(len, (*((column[0],) if is_whole else column[0].split()), *column[1:])))
        for column, is_whole in zip(columns, whole, strict=True)
    ]
    text = io.StringIO()
    # A pipe gets what a terminal of 100 columns would show.
    console = Console(file=text, highlight=False, width=shutil.get_terminal_size((100, 24)).columns)
    start = 1
    while start < len(columns):
        stop = start + 1
        while stop < len(columns) and widths[0] + sum(widths[start : stop + 1]) + 2 <= console.width:
            stop += 1
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number in (0, *range(start, stop)):
            justify: Literal["left", "right"] = "left" if whole[number] else "right"
            table.add_column(columns[number][0], justify=justify, vertical="bottom", width=widths[number] - 2, no_wrap=whole[number])
        for line in range(1, len(rows) + 1):
            cells_shown = [columns[number][line] for number in range(start, stop)]
            if start == 1 or any(cells_shown):
                table.add_row(columns[0][line], *cells_shown)
        console.print(table)
        start = stop
    for note in notes:
        console.print(note, soft_wrap=True)
    return text.getvalue()
