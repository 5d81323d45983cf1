"""What is measured between two log steps, and what is kept of it."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from orl_fast.distributed import Ranks
from orl_fast.errors import DataError
from orl_fast.train import metrics
from orl_fast.train.metrics import Meter, MetricsLog, waiting_note
from tests.synthetic import small_config, synthetic_batch


def test_losses_are_means_and_counts_are_sums_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 2.0, 4.0, 4.0, 6.0, 6.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(seconds))
    meter = Meter(Ranks())
    assert list(meter.feed([])) == []  # waited from 1 s to 2 s
    for loss, num_skipped in ((1.0, 0), (3.0, 1), (2.0, 0)):
        meter.add({"loss": torch.tensor(loss, requires_grad=True), "intra": torch.tensor(2 * loss)}, num_images=8, num_skipped=num_skipped)
    record = meter.read()
    del record["time"]
    assert record == {"loss": 2.0, "intra": 4.0, "images_per_s": 24 / 4, "data_wait": 0.25, "skipped": 1}
    meter.add({"loss": torch.tensor(5.0)}, num_images=2, num_skipped=0)
    record = meter.read()
    del record["time"]
    assert record == {"loss": 5.0, "images_per_s": 1, "data_wait": 0, "skipped": 0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value: float) -> None:
    meter = Meter(Ranks())
    meter.add({"loss": torch.tensor(1.0), "inter": torch.tensor(value)}, num_images=8, num_skipped=0)
    with pytest.raises(DataError, match=rf"no longer finite \(loss 1.0, inter {value}\)"):
        meter.read()


def test_the_time_that_the_loader_takes_is_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(ticks)))
    config = small_config()
    batches = [synthetic_batch("byol", config, 2, step=step) for step in range(3)]
    meter = Meter(Ranks())
    assert list(meter.feed(batches)) == batches
    assert meter.waited_s() == 4  # one tick for each of three batches, and for the end


def test_records_beyond_the_step_of_a_resumed_run_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, step=2)
    log.write({"step": 3, "loss": 1.5, "time": 0.0})
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [3.0, 2.0, 1.5]
    assert list((tmp_path / "tensorboard").iterdir())


def test_waiting_is_split_by_what_the_loader_was_busy_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.time, "perf_counter", iter([0.0, 0.0, 4.0, 4.0, 5.0, 5.0, 5.0, 10.0, 10.0]).__next__)
    config, meter = small_config(), Meter(Ranks())
    slow, fast = ({"queue": 1.0, "decoding": 2.0, "drawing": 1.0}, {"queue": 0.0, "decoding": 0.0, "drawing": 3.0})
    batches = [replace(synthetic_batch("byol", config, 2), seconds=seconds) for seconds in (slow, fast)]
    assert len(list(meter.feed(batches))) == 2  # waited 4 s for the one, 1 s for the other
    meter.add({"loss": torch.tensor(1.0)}, num_images=2, num_skipped=0)
    record = meter.read()
    assert record["data_wait"] == 0.5
    assert {name: value for name, value in record.items() if name.startswith("wait_")} == pytest.approx(
        {"wait_queue": 0.1, "wait_decoding": 0.2, "wait_drawing": 0.2}
    )
    assert waiting_note({**record, "wait_decoding": 0.21}) == "50% waiting for data, most of it for decoding"
    assert waiting_note({"data_wait": 0.01, "wait_drawing": 0.01}) == "1% waiting for data"
