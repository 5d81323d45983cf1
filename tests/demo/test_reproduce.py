"""The steps of the paper's experiments: planned from what data there is, run once each, repeated where they failed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from orl_fast.cli.reproduce import command
from orl_fast.demo.layouts import draw_layouts
from orl_fast.demo.reproduce import REHEARSAL, DataSets, Scale, Step, StepFailed, announce, is_done, missing, plan, run_steps
from orl_fast.errors import DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DataSets:
    return DataSets(**draw_layouts(tmp_path_factory.mktemp("layouts"), num_images=6, num_classes=2))


def test_all_tables_are_planned_for_both_methods(drawn: DataSets, tmp_path: Path) -> None:
    steps = plan(drawn, tmp_path, scale=Scale())
    names = [step.name for step in steps]
    assert names[:5] == ["shard", "byol", "mine", "orl", "corloc"]
    assert names[-1] == "results"
    evaluations = {"voc07", "low-shot", "detect", "linear-imagenet", "linear-places", "linear-inat", "semi-1", "semi-10"}
    assert {name for name in names if name.endswith("-orl")} == {f"{name}-orl" for name in evaluations}
    assert {name for name in names if name.endswith("-byol")} == {f"{name}-byol" for name in evaluations}
    assert len(set(names)) == len(names)
    byol = next(step for step in steps if step.name == "byol")
    assert byol.num_images == 800 * 6
    assert byol.arguments[:2] == ("train", str(tmp_path / "shards" / "coco"))
    assert "4,800 images, 5 s at 1,000 images/s" in announce(steps, tmp_path)[1]
    assert missing(drawn) == []


def test_without_the_other_data_sets_coco_alone_is_planned(drawn: DataSets, tmp_path: Path) -> None:
    alone = DataSets(coco=drawn.coco)
    names = [step.name for step in plan(alone, tmp_path, scale=REHEARSAL)]
    assert names == ["shard", "byol", "mine", "orl", "corloc", "detect-orl", "detect-byol", "results"]
    assert len(missing(alone)) == 4
    assert missing(replace(drawn, lists=None)) == ["ImageNet 1 % and 10 %: no --lists"]
    with pytest.raises(DataError, match=r"--voc"):
        plan(replace(drawn, voc=tmp_path / "nowhere"), tmp_path, scale=Scale())
    with pytest.raises(DataError, match="train2017/ holds no images"):
        plan(DataSets(coco=tmp_path), tmp_path, scale=Scale())


def test_a_step_runs_once_and_a_failed_one_again(tmp_path: Path) -> None:
    good = Step(name="good", arguments=("--version",))
    bad = Step(name="bad", arguments=("verify", str(tmp_path / "nowhere")))
    assert run_steps([bad, good], tmp_path) == ["bad"]
    assert is_done(good, tmp_path)
    assert not is_done(bad, tmp_path)
    assert not is_done(replace(good, arguments=("--help",)), tmp_path)
    before = (tmp_path / "steps" / "good.json").read_bytes()
    assert json.loads(before)["arguments"] == ["--version"]
    with pytest.raises(StepFailed, match=r"bad failed \(exit code 1\)"):
        run_steps([good, replace(bad, needed=True)], tmp_path)
    assert (tmp_path / "steps" / "good.json").read_bytes() == before


_SLOW = """#!/bin/sh
trap 'sleep 0.6; touch saved; exit 130' INT TERM
touch started
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_step_that_is_stopped_has_the_time_to_save(signum: signal.Signals, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text(_SLOW)
    slow.chmod(0o755)
    steps = "[Step(name='a', arguments=('x',)), Step(name='b', arguments=('x',))]"
    code = f"import sys; from orl_fast.demo.reproduce import *; sys.executable = {str(slow)!r}; run_steps({steps}, Path('.'))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "steps").exists()


def test_a_step_that_is_killed_without_being_asked_to_stop_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "killed"  # as by the kernel, where memory runs out
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert run_steps([Step(name="a", arguments=("x",)), Step(name="b", arguments=("x",))], tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "where is COCO?"),
        (["--rehearse", "--coco", "x"], 2, "--rehearse draws all data sets itself"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == code
    assert message in result.output


def test_the_plan_is_shown_without_running_anything(drawn: DataSets, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--coco", str(drawn.coco), "--out", str(tmp_path / "out"), "--plan"])
    assert result.exit_code == 0, result.output
    assert "byol: 4,800 images, 5 s at 1,000 images/s, 3.3 GB on disk" in result.output
    assert "left out: Places205 linear: no --places" in result.output
    assert not (tmp_path / "out").exists()
