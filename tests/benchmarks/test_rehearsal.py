"""A sleeping step: what counts as waiting, and that the whole rehearsal gives what it promises."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import rehearsal
from benchmarks.photographs import draw_jpeg
from benchmarks.rehearsal import SleepingStep
from orl_fast.cli.bench import command


class _Machine:
    """A clock that only sleeping and loading advance. Its host oversleeps."""

    def __init__(self, *, load_s: float, late_s: float = 0.0) -> None:
        self.now_s, self.load_s, self.late_s = 0.0, load_s, late_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.late_s

    def batches(self) -> Iterator[int]:
        """One batch is loaded after another, from the time on that the one before was taken."""
        for i in range(1000):
            self.now_s += self.load_s
            yield i

    def waited(self, step_s: float, *, num_steps: int, uncounted: int = 0) -> float:
        step = SleepingStep(step_s, clock=lambda: self.now_s, sleep=self.sleep)
        return step.run(self.batches(), num_steps, uncounted=uncounted)


def test_a_step_waits_for_what_the_loader_takes_longer() -> None:
    assert _Machine(load_s=3.0).waited(2.0, num_steps=10) == pytest.approx(10 * (3.0 - 2.0))
    assert _Machine(load_s=3.0).waited(2.0, num_steps=10, uncounted=5) == pytest.approx(10 * (3.0 - 2.0))
    assert _Machine(load_s=1.5).waited(2.0, num_steps=10) == 0


def test_a_host_that_is_woken_late_delays_no_step_whose_batch_is_there() -> None:
    assert _Machine(load_s=0.0, late_s=1.5).waited(2.0, num_steps=50) == 0
    late = _Machine(load_s=0.0, late_s=0.7)
    late.waited(2.0, num_steps=50)
    assert late.now_s == pytest.approx(50 * 2.0 + 0.7)  # the lateness does not add up


def test_a_step_far_too_fast_waits_nearly_always(tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / f"{seed}.jpg").write_bytes(draw_jpeg(seed, width_px=320, height_px=240))
    rows = rehearsal.run(tmp_path, step_ms=0.01, batch=4, quick=True, core_counts=[1])
    assert [row.name for row in rows] == ["the step, if it never waited", "JPEG bytes", "JPEG bytes, partner patches", "pixel shards"]
    for row in rows[1:]:
        assert row.waiting > 0.8
        assert row.waits_from is not None
        assert row.median < row.waits_from * 3  # what is reached is what the loader gives, as far as a busy machine lets one say
        assert row.ratio == pytest.approx(1 - row.waiting)
        assert row.cores_busy is not None
        assert 0 < row.cores_busy < 1.5
        assert asdict(row).keys() >= {"name", "unit", "median", "iqr", "ratio", "cores", "step_ms", "waiting", "waits_from"}


def test_the_assumed_time_of_a_step_is_shared_by_the_cores() -> None:
    assert [rehearsal.assumed_step_s(95, cores=cores) for cores in (1, 2, 16)] == pytest.approx([1.6, 0.8, 0.1])


def test_options_are_checked_and_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments in (["loader", "--step-ms", "5"], ["step", "--batch", "5"], ["step", "--step-ms", "0"], ["step", "--step-ms", "soon"]):
        assert CliRunner().invoke(command, arguments).exit_code == 2
    row = rehearsal.FedRow(
        name="pixel shards", unit="images/s", median=8, iqr=1, ratio=0.8, group="1 core", cores=1, step_ms=5, waiting=0.2, waits_from=9
    )
    calls: list[tuple[object, ...]] = []

    def run(source: Path | None, *, step_ms: float | None, batch: int, quick: bool) -> list[rehearsal.FedRow]:
        calls.append((source, step_ms, batch, quick))
        return [row]

    monkeypatch.setattr(rehearsal, "run", run)
    file = tmp_path / "r.json"
    for time_ms in ("auto", "5"):
        result = CliRunner().invoke(command, ["step", "--step-ms", time_ms, "--batch", "6", "--json", str(file)])
        assert result.exit_code == 0, result.output
        assert ("assumption" in result.output) == (time_ms == "auto")
        assert "20.0%" in result.output
    assert calls == [(None, None, 6, False), (None, 5.0, 6, False)]
    (saved,) = json.loads(file.read_text())["rows"]
    assert (saved["waiting"], saved["waits_from"]) == (0.2, 9)
