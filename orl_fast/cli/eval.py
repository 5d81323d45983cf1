"""`orl-fast eval NAME`: evaluate a backbone. The options of a command are the fields of its evaluation's `Options`."""

import importlib
import inspect
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from orl_fast.cli.group import LazyGroup
from orl_fast.config import Section
from orl_fast.errors import ConfigError
from orl_fast.evals import EVALS
from orl_fast.evals.labels import LabelledOptions

_CHECKPOINT = """CHECKPOINT is a checkpoint.pt or the run folder that holds it; weights of torchvision, timm, MoCo, DINO, OpenSelfSup,
Detectron2 and others (.pth, .pkl, .safetensors; docs/export.md says how they are read); or `random`: the backbone untrained
(--backbone NAME)."""
_FLAGS = {"num_neighbors": "neighbors", "size_px": "size", "label_list": "list"}  # a field's name, where its option has another


class _Evals(LazyGroup):
    table, noun = EVALS, "evaluation"

    def load(self, name: str) -> click.Command:
        return _command(name)


@click.group(cls=_Evals)
def command() -> None:
    """Evaluate the backbone of a checkpoint, or of weights of another toolkit.

    The values are printed, and appended to evals.jsonl next to the checkpoint.
    """


def _command(name: str) -> click.Command:
    module: Any = importlib.import_module(f"orl_fast.evals.{name.replace('-', '_')}")
    fields: dict[str, FieldInfo] = module.Options.model_fields
    in_place = issubclass(module.Options, LabelledOptions)  # an annotation file in place of DATA
    common = [
        click.Argument(["checkpoint"]),
        click.Argument(["data"], type=click.Path(path_type=Path), required=not in_place),
        *(_option(field, info) for field, info in fields.items()),
        click.Option(["--backbone"], help="Architecture, where CHECKPOINT does not say it, for example resnet50."),
        click.Option(["--prefix"], help="Of the backbone's names in CHECKPOINT, where it holds several, for example student."),
        click.Option(["--out"], type=click.Path(path_type=Path, file_okay=False), help="Folder of evals.jsonl [default: CHECKPOINT's]."),
        click.Option(["--random-init"], is_flag=True, help="Also evaluate the same backbone untrained."),
        click.Option(["--workers"], type=click.IntRange(min=1), help="Threads and processes [default: one per core]."),
        click.Option(["--device"], type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.Option(["--json", "json_file"], type=click.Path(path_type=Path, dir_okay=False), help="Also write the records to this file."),
    ]

    def callback(checkpoint: str, data: Path | None, **values: Any) -> None:
        chosen = {field: values.pop(field) for field in fields}
        source = chosen["annotations"] if in_place and data is None else data
        if source is None or (in_place and data is not None and chosen["annotations"] is not None):
            raise click.UsageError("give either DATA or --annotations FILE")
        _run(name, module, checkpoint, source, _checked(module.Options, chosen), **values)

    text = f"{module.__doc__.strip()}\n\n{inspect.getdoc(module.Options)}\n\n{_CHECKPOINT}"
    return click.Command(name, params=common, callback=callback, help=text, short_help=EVALS[name])


def _flag(name: str) -> str:
    return f"--{_FLAGS.get(name, name).replace('_', '-')}"


def _option(name: str, info: FieldInfo) -> click.Option:
    """A field as an option: its type, limits, default and description."""
    kinds: tuple[Any, ...] = get_args(info.annotation)
    kind: Any = next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else info.annotation
    limits = {key: getattr(limit, key) for limit in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(limit, key)}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    bounds: dict[str, Any] = {"min": low, "max": high, "min_open": "gt" in limits, "max_open": "lt" in limits}
    flag = _flag(name)
    if get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    elif kind is Path:
        kind = click.Path(path_type=Path)
    elif kind in (int, float):
        kind = (click.IntRange if kind is int else click.FloatRange)(**bounds)
    elif kind is bool:
        flag += f"/--no-{flag[2:]}"
    if info.is_required():
        return click.Option([flag, name], type=kind, required=True, help=info.description)
    default = info.get_default(call_default_factory=True)
    return click.Option([flag, name], type=kind, default=default, show_default=default is not None, help=info.description)


def _checked(options: type[Section], chosen: dict[str, Any]) -> Section:
    """The options, with what the command line's types let pass (nan, or a rule of the section's own) refused as wrong usage."""
    try:
        return options(**chosen)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = "".join(f"{_flag(str(name))} {chosen[str(name)]}: " for name in fault["loc"][:1])
        raise click.UsageError(where + fault["msg"].removeprefix("Value error, ")) from error


def _run(
    name: str, module: Any, checkpoint: str, data: Path, options: Section, *, backbone: str | None, prefix: str | None, out: Path | None,
    random_init: bool, workers: int | None, device: Any, json_file: Path | None,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.table import Table

    from orl_fast.console import log
    from orl_fast.distributed import process_group
    from orl_fast.evals import Context
    from orl_fast.evals.evaluate import evaluate
    from orl_fast.files import write_json

    with process_group(device) as ranks:
        if ranks.world_size > 1 and not getattr(module, "DISTRIBUTED", False):
            raise ConfigError(f"{ranks.world_size} ranks: eval {name} is one process; start it without torchrun")
        if not ranks.is_main:
            log.setLevel("WARNING")  # once is enough
        context = Context(device=ranks.device, num_threads=workers or ranks.num_threads, ranks=ranks)
        records = evaluate(
            name, checkpoint, data, options, context=context, backbone=backbone, prefix=prefix, out=out, random_init=random_init
        )
    if not ranks.is_main:
        return
    scores = {key: str(heading) for key, heading in module.SCORES.items() if key in records[0]["values"]}  # options may leave some out
    table = Table("backbone", *scores.values(), title=EVALS[name].rstrip("."), title_justify="left")
    for record in records:
        shares = (record["values"].get(key) for key in scores)
        table.add_row(record["backbone"], *("–" if share is None else f"{100 * share:.1f} %" for share in shares))
    console, values = Console(highlight=False), records[0]["values"]
    console.print(table)
    others = ", ".join(f"{key} {value:g}" for key, value in values.items() if key not in scores)
    console.print(module.summary(values) if hasattr(module, "summary") else others, soft_wrap=True)
    if json_file:
        write_json(json_file, records)
