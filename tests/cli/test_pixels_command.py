"""`orl-fast pixels`, and --pixels of `orl-fast shard`, as a user runs them."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from orl_fast.cli.main import cli
from orl_fast.cli.pixels import _Bytes
from orl_fast.errors import DataError
from orl_fast.shards import ShardIndex
from orl_fast.shards.pixels import PixelStore


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.linear_gradient("L").resize((60 + i, 40)).convert("RGB").save(folder / f"{i}.jpg")
    return folder


def test_packing_with_pixels_and_what_info_and_verify_say(photos: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    done = run("shard", photos, "--out", packed, "--shard-size", 4, "--workers", 1, "--pixels", "--budget", "30kB")
    assert done.exit_code == 0, done.output
    assert "the pixels of 2 of 6 images in 1 shards, 20.5 kB" in done.output
    assert "2 of 6 images (33%), 20.5 kB in" in run("info", packed).output
    done = run("pixels", packed, "--workers", 1)
    assert "the pixels of all 6 images in 2 shards" in done.output
    assert "6 of 6 images (100%)" in run("info", packed).output
    assert run("verify", packed, "--workers", 1).exit_code == 0
    path = packed / "pixels-000001.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    found = run("verify", packed, "--workers", 1)
    assert "pixels-000001.tar: its bytes have changed since it was written" in found.output
    assert isinstance(found.exception, DataError)
    assert f"1 files are damaged; run orl-fast pixels {packed} --overwrite" in str(found.exception)
    assert run("pixels", packed, "--workers", 1, "--overwrite").exit_code == 0
    assert run("verify", packed, "--workers", 1).exit_code == 0


def test_pixels_in_another_folder(photos: Path, tmp_path: Path) -> None:
    packed, other = tmp_path / "packed", tmp_path / "fast"
    run("shard", photos, "--out", packed, "--workers", 1)
    assert "not stored; orl-fast pixels" in run("info", packed).output
    assert run("pixels", packed, "--pixels-dir", other, "--max-side", 32, "--workers", 1).exit_code == 0
    store = PixelStore.find(ShardIndex.open(packed))
    assert store is not None
    assert store.folder == other
    assert f"in {other}, sides of at most 32 px" in run("info", packed).output


@pytest.mark.parametrize("option", [["--budget", "1GB"], ["--max-side", "100"], ["--pixels-dir", "x"]])
def test_settings_of_pixels_without_pixels_are_wrong_usage(option: list[str], photos: Path, tmp_path: Path) -> None:
    done = run("shard", photos, "--out", tmp_path / "packed", *option)
    assert done.exit_code == 2
    assert "add --pixels" in done.output
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("60GB", 60 * 10**9), ("1.5 TB", 15 * 10**11), ("500MiB", 500 * 2**20), ("2k", 2000), ("12", 12), ("3gi", 3 * 2**30)],
)
def test_sizes(text: str, expected: int) -> None:
    assert _Bytes().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "ten", "1 PB"])
def test_other_sizes_are_wrong_usage(text: str, photos: Path, tmp_path: Path) -> None:
    done = run("pixels", tmp_path, "--budget", text)
    assert done.exit_code == 2
    assert "write a size such as 60GB" in done.output
