"""The table of all evaluations: the latest value of each cell, next to the paper's rows."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orl_fast.cli.results import command
from orl_fast.errors import DataError, MissingStageError
from orl_fast.evals.results import PAPER_COLUMNS, PAPER_ROWS, as_csv, as_markdown, collect, read_records


def _record(**changes: Any) -> dict[str, Any]:
    record = {
        "time": "2026-01-01T00:00:00+00:00", "eval": "probe", "backbone": "runs/a/byol", "encoder": "abc", "architecture": "resnet18",
        "checkpoint": "checkpoint.pt", "method": "byol", "step": 40, "data": "data/pets", "options": {},
        "values": {"top1": 0.5, "num_test": 7},
    }  # fmt: skip
    return record | changes


def _write(folder: Path, *records: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / "evals.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_latest_value_of_each_backbone_and_data_set(tmp_path: Path) -> None:
    later = "2026-02-01T00:00:00+00:00"
    _write(
        tmp_path / "byol",
        _record(time=later, values={"top1": 0.75, "mean_class_accuracy": 0.6}),
        _record(),
        _record(data="data/cars", values={"top1": 0.25}),
        _record(backbone="random initialization", encoder="def", checkpoint=None, method=None, step=None, values={"top1": 0.125}),
    )
    _write(tmp_path / "orl", _record(backbone="runs/a/orl", method="orl", eval="knn", values={"top1": 0.5}))
    results = collect(read_records([tmp_path]), paper=False)
    table = list(csv.reader(as_csv(results).splitlines()))
    assert table == [
        ["backbone", "architecture", "training", "probe top-1 (cars)", "probe top-1 (pets)", "knn top-1 (pets)"],
        ["runs/a/byol", "resnet18", "byol, step 40", "25.0", "75.0", ""],
        ["random initialization", "resnet18", "", "", "12.5", ""],
        ["runs/a/orl", "resnet18", "orl, step 40", "", "", "50.0"],
    ]
    everything = collect(read_records([tmp_path]), paper=False, every=True)
    assert any(column.key == "mean_class_accuracy" for column in everything.columns)


def test_other_options_than_the_protocols_are_marked(tmp_path: Path) -> None:
    standard, other = {"num_neighbors": 20, "seed": 0, "test": "/data/val"}, {"num_neighbors": 5, "seed": 0}
    _write(tmp_path / "a", _record(eval="knn", options=standard))
    _write(tmp_path / "b", _record(eval="knn", options=other, encoder="def"))
    text = as_markdown(collect(read_records([tmp_path]), paper=False))
    assert "| 50.0 |" in text
    assert "| 50.0 a |" in text
    assert text.endswith("\na) knn: num neighbors 5\n")


def test_the_papers_rows_stand_above(tmp_path: Path) -> None:
    assert all(len(values) == len(PAPER_COLUMNS) for values in PAPER_ROWS.values())
    linear = _record(eval="unknown", values={"top1": 1.0})
    _write(tmp_path, _record(), linear)
    lines = as_markdown(collect(read_records([tmp_path]))).splitlines()
    assert "VOC07 SVM mAP" in lines[0]
    assert "ImageNet 1 %" not in lines[0]  # no row has a value
    assert lines[3].startswith("| paper: ORL, COCO | resnet50 | 800 epochs | 86.7 | 59.0 | 52.7 | 31.8 | 40.3 | 36.3 |")
    assert len(lines) == 2 + len(PAPER_ROWS) + 1


def test_only_data_of_the_papers_size_is_put_into_its_columns(tmp_path: Path) -> None:
    whole = {"map": 0.5, "num_classes": 20, "num_test": 4951}
    voc = {"eval": "voc07", "data": "data/VOCdevkit"}
    _write(
        tmp_path,
        _record(**voc, values=whole),
        _record(**voc, values=whole | {"map": 0.25}, options={"low_shot": True}),
        _record(**voc, values=whole | {"map": 0.75, "num_test": 50}),
        _record(eval="semi", data="in1k", values={"top1": 0.5, "num_classes": 1000, "num_train": 12811}, options={"label_list": "a/1.txt"}),
        _record(eval="semi", data="in1k", values={"top1": 0.25, "num_classes": 100, "num_train": 50}, options={"label_list": "half.txt"}),
    )
    table = list(csv.reader(as_csv(collect(read_records([tmp_path]), paper=False)).splitlines()))
    assert dict(zip(table[0][3:], table[1][3:], strict=True)) == {
        "VOC07 SVM mAP": "50.0", "ImageNet 1 % top-1": "50.0", "voc07 mAP (VOCdevkit)": "75.0", "voc07 mAP (VOCdevkit, low-shot)": "25.0",
        "semi top-1 (in1k, half)": "25.0",
    }  # fmt: skip


def test_damaged_lines_are_skipped_and_folders_without_records_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path / "a", "", "{", "[1]", '{"eval": "knn"}', _record())
    assert len(read_records([tmp_path / "a", tmp_path])) == 1
    assert "3 lines are no records" in caplog.text
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(MissingStageError, match="run orl-fast eval"):
            read_records([path])
    with pytest.raises(DataError, match="holds no record"):
        read_records([_write(tmp_path / "b", "x")])


def test_the_command_prints_what_fits_and_writes_files(tmp_path: Path) -> None:
    records = [_record(data=f"data/{name}") for name in ("first", "second", "third", "fourth", "fifth", "sixth")]
    folder = str(_write(tmp_path / "byol", *records))
    shown = CliRunner().invoke(command, [folder], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert shown.output.count("runs/a/byol") > 1  # in each part of the table
    assert "50.0" in shown.output
    for kind in ("text", "csv", "markdown"):
        written = CliRunner().invoke(command, [folder, "--format", kind, "--out", str(tmp_path / kind)])
        assert written.exit_code == 0, written.output
        assert (tmp_path / kind).read_text() == CliRunner().invoke(command, [folder, "--format", kind]).output
