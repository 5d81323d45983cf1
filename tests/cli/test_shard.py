"""`orl-fast shard` and `orl-fast verify` as a person runs them."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def orl_fast(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orl_fast.cli.main", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def test_pack_again_and_verify(photos: Path, tmp_path: Path) -> None:
    (photos / "bad\n.jpg").write_bytes(b"x")
    buffer = io.BytesIO()
    Image.new("RGBA", (9, 9)).save(buffer, "PNG")
    (photos / "odd.png").write_bytes(buffer.getvalue())
    done = orl_fast("shard", "photos", "--shard-size", 3, "--workers", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shards/photos: 7 images in 3 shards" in done.stdout
    assert "6 with their original bytes, 1 re-encoded" in done.stdout
    assert "1 PNG RGBA" in done.stdout
    assert "1 quarantined" in done.stdout
    assert r"'bad\n.jpg': not an image of a known format" in done.stdout
    again = orl_fast("shard", "photos/", "--shard-size", 3, folder=tmp_path)
    assert again.returncode == 0
    assert "up to date" in again.stderr
    assert again.stdout == done.stdout
    for options in ((), ("shards/photos", "--fast"), ("photos", "--decode")):
        verified = orl_fast("verify", *options, folder=tmp_path)
        assert verified.returncode == 0, verified.stderr
        assert "7 images in 3 shards are as they were packed" in verified.stdout


def test_verify_tells_each_fault_and_fails(photos: Path, tmp_path: Path) -> None:
    orl_fast("shard", "photos", "--shard-size", 3, "--workers", 1, folder=tmp_path)
    shard = tmp_path / "shards" / "photos" / "images-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = orl_fast("verify", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("shards/photos/images-000001.tar: has ")
    assert "--overwrite" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["shard", "nowhere"], 1, "nowhere: no such folder; give a folder of images"),
        (["shard", "empty"], 1, "empty: holds no images"),
        (["shard", "photos/0.jpg"], 1, "photos/0.jpg: is a file"),
        (["shard", "photos", "--out", "photos/out"], 1, "lies within the source"),
        (["shard", "."], 1, "lies within the source"),
        (["shard", "photos", "--split", "val"], 1, "has no splits"),
        (["shard", "photos", "photos"], 1, "give each folder once"),
        (["shard", "photos", "--out", "other"], 1, "is not empty and not a dataset"),
        (["shard"], 2, "Missing argument 'SRC...'"),
        (["shard", "photos", "--workers", "0"], 2, "--workers"),
        (["verify"], 1, "run orl-fast shard FOLDER first"),
        (["verify", "photos"], 1, "photos: not a dataset"),
        (["verify", "nowhere"], 1, "nowhere: no such folder"),
        (["verify", "photos", "--fast", "--decode"], 2, "choose one"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(photos: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    done = orl_fast(*arguments, folder=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
