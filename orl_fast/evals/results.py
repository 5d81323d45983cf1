"""The values of all runs' evals.jsonl as one table, next to the paper's rows."""

import csv
import importlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from orl_fast.console import log
from orl_fast.errors import DataError, MissingStageError
from orl_fast.evals import EVALS
from orl_fast.evals.evaluate import RECORDS

PAPER = "paper"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One value of an evaluation on one data set; a share, shown in percent."""

    heading: str
    eval: str
    key: str  # of the record's values
    dataset: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)  # of the paper's data set, among the record's values

    @property
    def identity(self) -> tuple[str, str, str]:
        return (self.eval, self.key, self.dataset)


def _top1(evaluation: str, heading: str, **counts: int) -> Column:
    return Column(heading=f"{heading} top-1", eval=evaluation, key="top1", dataset=heading, counts=counts)


# Of ORL's Tables 1 to 4, in their order.
PAPER_COLUMNS = (
    Column(heading="VOC07 SVM mAP", eval="voc07", key="map", counts={"num_classes": 20, "num_test": 4952}),
    _top1("linear", "ImageNet linear", num_classes=1000, num_val=50_000),
    _top1("linear", "Places205 linear", num_classes=205, num_val=20_500),
    _top1("linear", "iNat18 linear", num_classes=8142, num_val=24_426),
    _top1("semi", "ImageNet 1 %", num_classes=1000, num_train=12_811),
    _top1("semi", "ImageNet 10 %", num_classes=1000, num_train=128_116),
    Column(heading="COCO box AP", eval="detect", key="box_ap", counts={"num_classes": 80, "num_test_images": 5000}),
    Column(heading="COCO mask AP", eval="detect", key="mask_ap", counts={"num_classes": 80, "num_test_images": 5000}),
)
# In percent, in the order of the columns; None: not at hand. ResNet-50, 800 epochs.
PAPER_ROWS: Mapping[str, Sequence[float | None]] = {
    "BYOL, COCO": (84.5, 57.8, 50.5, 29.5, None, None, 39.5, 35.6),
    "ORL, COCO": (86.7, 59.0, 52.7, 31.8, None, None, 40.3, 36.3),
    "BYOL, COCO+": (87.0, None, None, None, None, None, None, None),
    "ORL, COCO+": (88.6, None, None, None, None, None, None, None),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A backbone with its latest value of each column, as a share; `notes` says where options differ from the protocol's."""

    name: str
    values: Mapping[tuple[str, str, str], float]
    notes: Mapping[tuple[str, str, str], str]
    architecture: str = ""
    epochs: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Rows and the columns that some row fills."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of evals.jsonl files, or of those in and below folders, with their "folder".

    Lines that are damaged are skipped and counted. MissingStageError: there is no such file.
    """
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(path.rglob(RECORDS)) if path.is_dir() else []
        if not found:
            raise MissingStageError(f"{path}: no {RECORDS} here; run orl-fast eval NAME CHECKPOINT DATA first, or name another folder")
        files += found
    records = []
    for file in dict.fromkeys(files):
        damaged = 0
        for line in filter(bytes.strip, file.read_bytes().splitlines()):
            record = _record(line)
            if record is None:
                damaged += 1
            else:
                records.append({**record, "folder": file.parent})
        if damaged:
            log.warning("%s: %d lines are no records of an evaluation: skipped", file, damaged)
    if not records:
        raise DataError(f"{files[0]}: holds no record of an evaluation; run orl-fast eval again")
    return records


def collect(records: Sequence[Mapping[str, Any]], *, paper: bool = True, every: bool = False) -> Results:
    """One row for each backbone (by its weights and folder), one column for the main value of each evaluation and data set.

    Of several records of one cell the latest is taken. The paper's rows come first, and its columns as far as a row fills them. `every`:
    a column for each value of an evaluation's `SCORES`, not for the first alone.
    """
    columns = {column.identity: column for column in PAPER_COLUMNS}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: str(record.get("time", ""))):
        row = rows.setdefault((str(record["folder"]), str(record["encoder"])), {"values": {}, "notes": {}})
        row["record"] = record
        for number, (key, heading) in enumerate(_scores(record["eval"]).items()):
            value, column = record["values"].get(key), _column(record, key, heading)
            if isinstance(value, int | float) and (every or number == 0 or column in PAPER_COLUMNS):
                identity = columns.setdefault(column.identity, column).identity
                row["values"][identity], row["notes"][identity] = float(value), _departures(record)
    found = [
        Row(name=_name(row["record"]), values=row["values"], notes={key: note for key, note in row["notes"].items() if note},
            architecture=str(row["record"].get("architecture", "")), epochs=_training(row["record"]))
        for row in rows.values()
    ]  # fmt: skip
    of_paper = [
        Row(name=f"{PAPER}: {name}", architecture="resnet50", epochs="800 epochs", notes={},
            values={column.identity: value / 100 for column, value in zip(PAPER_COLUMNS, values, strict=True) if value is not None})
        for name, values in PAPER_ROWS.items()
    ]  # fmt: skip
    shown = (of_paper if paper else []) + found
    filled = {identity for row in shown for identity in row.values}
    others = [column for identity, column in columns.items() if identity in filled and column not in PAPER_COLUMNS]
    others.sort(key=lambda column: (list(EVALS).index(column.eval), column.dataset))
    return Results(columns=(*(column for column in PAPER_COLUMNS if column.identity in filled), *others), rows=tuple(shown))


def cells(results: Results, *, marks: bool = True) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, rows of text, and notes. A marked value was measured with other options than the protocol's, which its note lists."""
    notes: dict[str, str] = {}
    rows = []
    for row in results.rows:
        line = [row.name, row.architecture, row.epochs]
        for column in results.columns:
            value, note = row.values.get(column.identity), row.notes.get(column.identity, "")
            mark = ""
            if value is not None and note and marks:
                mark = " " + notes.setdefault(f"{column.eval}: {note}", _mark(len(notes)))
            line.append("" if value is None else f"{100 * value:.1f}{mark}")
        rows.append(line)
    headings = ["backbone", "architecture", "training", *(column.heading for column in results.columns)]
    return headings, rows, [f"{mark}) {note}" for note, mark in notes.items()]


def as_csv(results: Results) -> str:
    """Comma-separated, values in percent; an empty field where there is none."""
    headings, rows, _ = cells(results, marks=False)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headings, *rows])
    return text.getvalue()


def as_markdown(results: Results) -> str:
    """A table in Markdown, with its notes below."""
    headings, rows, notes = cells(results)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [headings, *rows]]
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    lines.insert(1, "|" + " --- |" * 3 + " ---: |" * len(results.columns))
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and isinstance(record.get("values"), dict) and {"eval", "encoder", "backbone"} <= record.keys()
    return record if known else None


def _module(name: str) -> Any:
    return importlib.import_module(f"orl_fast.evals.{name.replace('-', '_')}") if name in EVALS else None


def _scores(name: str) -> Mapping[str, str]:
    module = _module(name)
    return {str(key): str(heading) for key, heading in module.SCORES.items()} if module else {}


def _column(record: Mapping[str, Any], key: str, heading: str) -> Column:
    """The paper's, where the data are as many as the paper's (within a hundredth); else one of the data set's own, by its folder's name."""
    values, options = record["values"], record.get("options") or {}
    few = bool(options.get("low_shot"))
    for column in PAPER_COLUMNS:
        alike = (abs(values.get(name, 0) - count) <= count / 100 for name, count in column.counts.items())
        if (column.eval, column.key) == (record["eval"], key) and not few and all(alike):
            return column
    labels = [Path(str(options["label_list"])).stem] if options.get("label_list") else []
    dataset = ", ".join([Path(str(record.get("data", ""))).name, *(["low-shot"] if few else []), *labels])
    name = heading if record["eval"] in heading.lower() else f"{record['eval']} {heading}"
    return Column(heading=f"{name} ({dataset})", eval=record["eval"], key=key, dataset=dataset)


def _departures(record: Mapping[str, Any]) -> str:
    """The options that are not the defaults, but for paths and switches that are part of the column."""
    module = _module(record["eval"])
    if module is None:
        return ""
    told = []
    for name, value in (record.get("options") or {}).items():
        known = module.Options.model_fields.get(name)
        if known is None or value is None or name in ("dataset", "low_shot") or Path in (known.annotation, *get_args(known.annotation)):
            continue
        if value != (None if known.is_required() else known.get_default(call_default_factory=True)):
            told.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(told)


def _name(record: Mapping[str, Any]) -> str:
    if record.get("method") is None and record.get("checkpoint") is None:
        return "random initialization"
    return str(record["backbone"])


def _training(record: Mapping[str, Any]) -> str:
    return f"{record['method']}, step {record['step']}" if record.get("method") else ""


def _mark(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"n{number}"
