"""The harness: ratios within rounds, files in the promised form."""

import json
import time
from pathlib import Path

from benchmarks.harness import Contender, compare, result, save_json, save_plot
from benchmarks.photographs import draw_jpeg, load_jpegs


def test_ratios_are_taken_round_by_round_against_the_first() -> None:
    calls: list[str] = []

    def worker(name: str, units: float) -> Contender:
        def run() -> float:
            calls.append(name)
            time.sleep(0.002)
            return units

        return Contender(name=name, run=run)

    rows = compare([worker("base", 1), worker("ours", 1000)], unit="images/s", rounds=4, group="g")
    assert calls == ["base", "ours", "base", "ours", "ours", "base", "base", "ours", "ours", "base"]
    assert (rows[0].ratio, rows[0].ratio_iqr) == (1, 0)
    assert rows[1].ratio > 50  # a thousandfold, less whatever the machine did in between
    assert rows[1].median > rows[0].median


def test_results_are_written_in_the_promised_form(tmp_path: Path) -> None:
    rows = compare([Contender(name="base", run=lambda: 1.0), Contender(name="ours", run=lambda: 2.0)], unit="boxes/s", rounds=2)
    save_json(tmp_path / "r.json", result("test", rows))
    values = json.loads((tmp_path / "r.json").read_text())
    assert values.keys() >= {"machine", "versions", "rows"}
    assert all(row.keys() >= {"name", "unit", "median", "iqr", "ratio"} for row in values["rows"])
    assert values["rows"][0]["ratio"] == 1
    save_plot(tmp_path / "r.png", "test", rows)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_drawn_photographs_are_the_same_each_time() -> None:
    assert load_jpegs(None, limit=2) == [draw_jpeg(0), draw_jpeg(1)]
    assert 60_000 < len(draw_jpeg(0)) < 400_000
