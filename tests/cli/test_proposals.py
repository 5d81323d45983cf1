"""`orl-fast proposals` as a person runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from orl_fast.cli.main import cli
from orl_fast.errors import OrlFastError


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["proposals", *map(str, arguments), "--workers", "1"])
    if result.exception is not None and not isinstance(result.exception, SystemExit | OrlFastError):
        raise result.exception
    return result


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(coarse.repeat(12, 0).repeat(12, 1)).save(folder / f"{i}.jpg")
    (folder / "1b.jpg").write_bytes(b"x")
    return folder


def test_summary_a_second_run_and_standard_output(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "boxes.json"
    done = _run(photos, "--out", out, "--max-boxes", 7, "--seed", 5)
    assert done.exit_code == 0
    values = json.loads(out.read_text())
    assert f"{out}: {len(values['annotations'])} proposals in 3 images" in done.stdout
    assert "1 skipped" in done.stdout
    assert "'1b.jpg': not an image of a known format" in done.stdout
    assert values["info"]["filter"] == {"max_rois": 7}
    written = out.read_bytes()
    again = _run(photos, "--out", out)
    assert "exists; replace it with --overwrite" in str(again.exception)
    assert out.read_bytes() == written
    assert _run(photos, "--out", out, "--overwrite").exit_code == 0
    assert out.read_bytes() != written
    piped = _run(photos, "--out", "-", "--seed", 5, "--max-boxes", 7)
    assert piped.stdout.encode() == written
    assert "1 skipped" in piped.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "--out", "boxes.json"], 1, "nowhere: no such file or folder; give an image or a folder of images"),
        (["empty", "--out", "boxes.json"], 1, "empty: holds no images"),
        (["photos/1b.jpg", "--out", "boxes.json"], 1, "no image can be decoded"),
        (["photos", "--out", "boxes.json", "--split", "val"], 1, "has no splits"),
        (["photos"], 2, "Missing option '--out'"),
        (["photos", "--out", "empty"], 2, "is a directory"),
        (["photos", "--out", "boxes.json", "--max-aspect", "0.5"], 2, "--max-aspect"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = _run(*arguments)
    assert done.exit_code == code
    assert message in (str(done.exception) if code == 1 else done.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_leaves_no_file(photos: Path, tmp_path: Path) -> None:
    for i in range(200):
        (photos / f"more{i}.jpg").symlink_to("0.jpg")
    out = tmp_path / "out" / "boxes.json"
    command = [sys.executable, "-m", "orl_fast.cli.main", "proposals", str(photos), "--out", str(out), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None and not (out.parent.is_dir() and any(out.parent.iterdir())):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: all processes of the group, workers that are just starting too
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr == "Interrupted: no file was written.\n"
    assert list(out.parent.iterdir()) == []
