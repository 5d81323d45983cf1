"""Fits in processes: the same results whatever their number, and what is finished is not computed again."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from orl_fast.evals import fits, svm
from orl_fast.evals.fits import Level, Results


def _tasks(level: Level, num: int) -> list[svm.CrossValidation]:
    labels = np.where(np.arange(40) % 4 == 0, 1, -1).astype(np.int8)
    return [svm.CrossValidation(key=f"folds {cost}", basis=level.basis, labels=labels, cost=cost) for cost in svm.COSTS[:num]]


def _parts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((40, 60), dtype=np.float32), rng.random((10, 60), dtype=np.float32)


def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "_WORTH_PROCESSES_S", 0)
    kept = []
    for num_workers in (1, 2):
        results = Results(tmp_path / f"{num_workers}.jsonl", num_workers=num_workers)
        with Level.open(*_parts(), tmp_path / "basis") as level:
            tasks = _tasks(level, 5)
            results.run(svm.cross_validate, tasks, level, lambda: None)
        kept.append([results[task.key] for task in tasks])
        assert not (tmp_path / "basis").exists()
    assert kept[0] == kept[1]


def test_a_killed_run_loses_only_what_was_not_finished(tmp_path: Path) -> None:
    file = tmp_path / "svm.jsonl"
    with Level.open(*_parts(), tmp_path / "basis") as level:
        tasks = _tasks(level, 4)
        whole = Results(file, num_workers=1)
        whole.run(svm.cross_validate, tasks, level, lambda: None)
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[:2], lines[2][:20]]))  # killed while it wrote the third
        resumed, calls = Results(file, num_workers=1), []
        assert resumed.count(task.key for task in tasks) == 2
        resumed.run(svm.cross_validate, tasks, level, lambda: calls.append(1))
        assert len(calls) == 2
        assert [resumed[task.key] for task in tasks] == [whole[task.key] for task in tasks]
        again = Results(file, num_workers=1)
        assert again.count(task.key for task in tasks) == 4
    with Level.open(*_parts(), tmp_path / "basis") as level:
        again.run(svm.cross_validate, tasks, level, lambda: pytest.fail("computed again"))
        assert not level.basis.train.exists()  # not even prepared


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_a_fit(tmp_path: Path, stop: signal.Signals) -> None:
    results, folder, calls = Results(tmp_path / "svm.jsonl", num_workers=1), tmp_path / "basis", []

    def advance() -> None:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(stop)

    with pytest.raises(KeyboardInterrupt), Level.open(*_parts(), folder) as level:
        results.run(svm.cross_validate, _tasks(level, 5), level, advance)
    assert not folder.exists()
    again = Results(tmp_path / "svm.jsonl", num_workers=1)
    assert again.count(f"folds {cost}" for cost in svm.COSTS[:5]) == 2


def test_fits_at_the_limit_of_iterations_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "svm.jsonl"
    file.write_text("".join(json.dumps({"key": f"folds {cost}", "ap": 0.5, "steps": 2000}) + "\n" for cost in svm.COSTS[:3]))
    results = Results(file, num_workers=1)
    with Level.open(*_parts(), tmp_path / "basis") as level:
        results.run(svm.cross_validate, _tasks(level, 2), level, lambda: None)
    assert results.num_unconverged == 2  # of this run's two
