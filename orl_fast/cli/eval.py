"""`orl-fast eval NAME`: evaluate a backbone. The options of a command are the fields of its evaluation's `Options`."""

import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any, get_args

import click
from pydantic.fields import FieldInfo

from orl_fast.evals import EVALS

_FLAGS = {"num_neighbors": "neighbors", "size_px": "size"}  # a field's name, where its option has another


class _Evals(click.Group):
    """Loads an evaluation only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(EVALS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in EVALS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], EVALS, n=1) if args and args[0] not in EVALS else []
        if near:
            ctx.fail(f"No such evaluation {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Evaluations"):
            formatter.write_dl(list(EVALS.items()))


@click.group(cls=_Evals)
def command() -> None:
    """Evaluate the frozen backbone of a checkpoint. The values are printed, and appended to evals.jsonl beside the checkpoint."""


def _command(name: str) -> click.Command:
    module: Any = importlib.import_module(f"orl_fast.evals.{name.replace('-', '_')}")
    fields: dict[str, FieldInfo] = module.Options.model_fields
    common = [
        click.Argument(["checkpoint"], type=click.Path(path_type=Path)),
        click.Argument(["data"], type=click.Path(path_type=Path), required="annotations" not in fields),
        *(_option(field, info) for field, info in fields.items()),
        click.Option(["--random-init"], is_flag=True, help="Also evaluate the same backbone untrained."),
        click.Option(["--workers"], type=click.IntRange(min=1), help="Threads that read and render [default: one per core]."),
        click.Option(["--device"], type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.Option(["--json", "json_file"], type=click.Path(path_type=Path, dir_okay=False), help="Also write the records to this file."),
    ]

    def callback(checkpoint: Path, data: Path | None, **values: Any) -> None:
        chosen = {field: values.pop(field) for field in fields}
        source = data or chosen.get("annotations")
        if source is None or (data is not None and chosen.get("annotations") is not None):
            raise click.UsageError("give either DATA or --annotations FILE")
        _run(name, module, checkpoint, source, chosen, **values)

    text = f"{module.__doc__.strip()}\n\n{inspect.getdoc(module.Options)}\n\nCHECKPOINT is checkpoint.pt or the run folder that holds it."
    return click.Command(name, params=common, callback=callback, help=text, short_help=EVALS[name])


def _option(name: str, info: FieldInfo) -> click.Option:
    """A field as an option: its type, limits, default and description."""
    kinds = [kind for kind in get_args(info.annotation) if kind is not type(None)] or [info.annotation]
    limits = {type(limit).__name__: getattr(limit, type(limit).__name__.lower()) for limit in info.metadata}
    low, high = limits.get("Ge", limits.get("Gt")), limits.get("Le", limits.get("Lt"))
    bounds: dict[str, Any] = {"min": low, "max": high, "min_open": "Gt" in limits, "max_open": "Lt" in limits}
    kind: Any
    if isinstance(kinds[0], str):
        kind = click.Choice(kinds)
    elif kinds[0] is Path:
        kind = click.Path(path_type=Path)
    elif kinds[0] in (int, float):
        kind = (click.IntRange if kinds[0] is int else click.FloatRange)(**bounds)
    else:
        kind = kinds[0]
    flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
    return click.Option([flag, name], type=kind, default=info.default, show_default=info.default is not None, help=info.description)


def _run(
    name: str, module: Any, checkpoint: Path, data: Path, chosen: dict[str, Any], *, random_init: bool, workers: int | None, device: Any,
    json_file: Path | None,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.table import Table

    from orl_fast.distributed import process_group
    from orl_fast.evals import Context
    from orl_fast.evals.evaluate import evaluate
    from orl_fast.files import write_json

    with process_group(device) as ranks:
        context = Context(device=ranks.device, num_threads=workers or ranks.num_threads)
        records = evaluate(name, checkpoint, data, module.Options(**chosen), context=context, random_init=random_init)
    if json_file:
        write_json(json_file, records)
    table = Table("backbone", *(str(heading) for heading in module.SCORES.values()), title=EVALS[name].rstrip("."), title_justify="left")
    for record in records:
        table.add_row(record["backbone"], *(f"{100 * record['values'][key]:.1f} %" for key in module.SCORES))
    console, values = Console(highlight=False), records[0]["values"]
    console.print(table)
    others = ", ".join(f"{key} {value:g}" for key, value in values.items() if key not in module.SCORES)
    console.print(module.summary(values) if hasattr(module, "summary") else others, soft_wrap=True)
