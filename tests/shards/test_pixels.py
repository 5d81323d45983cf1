"""Pixel shards: the JPEGs' own pixels, whole or absent, whatever stops the packing, and no damage goes unseen."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from odd_images import draw_image, encoded

from orl_fast.errors import DataError, StaleError
from orl_fast.shards import ShardIndex, ShardReader, write_shards
from orl_fast.shards.images import decode_rgb
from orl_fast.shards.pixels import PixelStore, pixel_faults, write_pixels
from orl_fast.shards.verify import verify_shards

FORMAT = Path(__file__).parents[2] / "shards" / "FORMAT.md"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("pixels*"))}


@pytest.fixture
def index(packed: Path) -> ShardIndex:
    return ShardIndex.open(packed)


@pytest.fixture
def store(index: ShardIndex) -> PixelStore:
    write_pixels(index, num_workers=1)
    found = PixelStore.find(index)
    assert found is not None
    return found


def test_pixels_are_those_of_the_jpegs(index: ShardIndex, store: PixelStore) -> None:
    with ShardReader(index) as reader:
        for row in range(len(index)):
            expected = np.asarray(decode_rgb(reader.read(row)))
            found = store.decoded(row)
            assert np.array_equal(found.pixels, expected)
            assert not found.pixels.flags.writeable
            assert (found.height, found.width) == expected.shape[:2]
    assert verify_shards(index.path, num_workers=1) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 2), (68, 56), (10, 11)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_any_size(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    draw_image(3, width=size[0], height=size[1]).convert(mode).save(tmp_path / "one" / "a.jpg")
    write_shards(tmp_path / "one", tmp_path / "packed", num_workers=1)
    index = ShardIndex.open(tmp_path / "packed")
    write_pixels(index, num_workers=1)
    store = PixelStore.find(index)
    assert store is not None
    assert store.decoded(0).pixels.shape == (size[1], size[0], 3)


# webdataset leaves closing its files to the garbage collector
@pytest.mark.filterwarnings("ignore:.*unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_example_of_the_format_runs(index: ShardIndex, store: PixelStore) -> None:
    example = next(text for text in re.findall(r"```python\n(.*?)```", FORMAT.read_text(), re.DOTALL) if "pixels-*.tar" in text)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    exec(example.replace("shards/coco", str(index.path)), names)
    key, pixels, mapped = names["key"], names["pixels"], names["mapped"]
    row = index.keys[:].index(key)  # type: ignore[arg-type]
    assert np.array_equal(pixels, store.decoded(row).pixels)  # type: ignore[arg-type]
    assert np.array_equal(mapped, store.decoded(0).pixels)  # type: ignore[arg-type]


def test_pixels_start_at_multiples_of_128_bytes(store: PixelStore) -> None:
    assert (store.table["offset"] % 128 == 0).all()


def test_bytes_do_not_depend_on_workers_or_repetition(index: ShardIndex, tmp_path: Path) -> None:
    write_pixels(index, tmp_path / "one", num_workers=1)
    write_pixels(index, tmp_path / "two", num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    write_pixels(index, tmp_path / "one", num_workers=1)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}


def test_a_budget_holds_a_prefix_that_grows_and_shrinks(index: ShardIndex, tmp_path: Path) -> None:
    whole = write_pixels(index, tmp_path / "whole", num_workers=1)
    folder, before = tmp_path / "part", 0
    budgets = [30_000, 60_000, 100_000, whole.num_bytes - 1, whole.num_bytes, 60_000]
    for budget in budgets:
        info = write_pixels(index, folder, budget_bytes=budget, num_workers=1)
        tars = sorted(folder.glob("pixels-*.tar"))
        assert sum(path.stat().st_size for path in tars) == info.num_bytes <= budget
        assert len(tars) == len(info.shards)
        store = PixelStore.find(index, folder)
        assert store is not None
        assert np.array_equal(store.table["offset"] >= 0, np.arange(len(index)) < info.num_stored)
        for row in range(info.num_stored):
            assert store.decoded(row).pixels.shape == (index.heights[row], index.widths[row], 3)
        assert budget == 60_000 or info.num_stored > before
        before = info.num_stored
    write_pixels(index, folder, num_workers=1)
    assert contents(folder) == contents(tmp_path / "whole")
    with pytest.raises(DataError, match="holds not one image"):
        write_pixels(index, folder, budget_bytes=100)
    assert contents(folder) == contents(tmp_path / "whole")


def test_longer_sides_are_shrunk(index: ShardIndex, tmp_path: Path) -> None:
    info = write_pixels(index, tmp_path, max_side=30, num_workers=1)
    assert info.max_side == 30
    store = PixelStore.find(index, tmp_path)
    assert store is not None
    for row in range(len(index)):
        found, longer = store.decoded(row), max(index.heights[row], index.widths[row])
        scale = min(1, 30 / longer)
        assert found.pixels.shape[:2] == (round(index.heights[row] * scale), round(index.widths[row] * scale))
        assert (found.height, found.width) == (index.heights[row], index.widths[row])
    with pytest.raises(StaleError, match="--overwrite"):
        write_pixels(index, tmp_path, num_workers=1)
    assert write_pixels(index, tmp_path, num_workers=1, overwrite=True).max_side is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_run_is_resumed_to_the_same_bytes(photos: Path, overwrite: bool, tmp_path: Path) -> None:
    photo = encoded(draw_image(0, width=500, height=400), quality=95)
    for i in range(60):
        (photos / f"more{i:03d}.jpg").write_bytes(photo + bytes([i]))
    write_shards([photos], tmp_path / "packed", shard_size=4, num_workers=1)
    index = ShardIndex.open(tmp_path / "packed")
    write_pixels(index, tmp_path / "straight", num_workers=1)
    if overwrite:  # a complete folder is damaged and written again
        shutil.copytree(tmp_path / "straight", tmp_path / "out")
        (tmp_path / "out" / "pixels-000004.tar").write_bytes(b"damaged")
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path; import sys; from orl_fast.shards import ShardIndex; from orl_fast.shards.pixels import write_pixels\n"
        "if __name__ == '__main__':\n"
        f"    write_pixels(ShardIndex.open(Path(sys.argv[1])), Path(sys.argv[2]), num_workers=2, overwrite={overwrite})"
    )
    done: dict[str, int] = {}
    for num_done in (1, 4):
        process = subprocess.Popen([sys.executable, script, index.path, tmp_path / "out"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 40
        while len(list((tmp_path / "out").glob(".pixels/??????.json"))) < num_done and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out" / "pixels.json").exists()
        with pytest.raises(DataError, match="are not finished; run orl-fast pixels"):
            PixelStore.find(index, tmp_path / "out")
        done = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".pixels").glob("??????.json")}
    deadline = time.monotonic() + 20
    while True:  # until the killed run's workers, which may still be writing, have exited
        try:
            write_pixels(index, tmp_path / "out", num_workers=1, overwrite=overwrite)
            break
        except DataError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(done) >= 4
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([".lock", *contents(tmp_path / "straight")])


def test_every_flipped_byte_is_found(index: ShardIndex, store: PixelStore) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(index.path.glob("pixels*")):
        if path.name == "pixels.json":
            continue
        whole = path.read_bytes()
        for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 12).tolist()]:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            faults = pixel_faults(index, fast=False, num_workers=1)
            assert faults, (path.name, at)
            assert all(file.parent == index.path for file, _ in faults)
        path.write_bytes(whole[:-1])
        assert pixel_faults(index, fast=True, num_workers=1)
        path.write_bytes(whole)
    assert pixel_faults(index, fast=False, num_workers=1) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"version": 9}', '{"version": 1, "shards": 3}', '{"version": 1, "shards": [[1]]}']
)
def test_a_damaged_manifest_is_refused_and_written_again(text: str, index: ShardIndex, store: PixelStore) -> None:
    before = contents(index.path)
    (index.path / "pixels.json").write_text(text)
    with pytest.raises(DataError, match=r"pixels.json: (damaged|format version).* run orl-fast pixels again"):
        PixelStore.find(index)
    assert pixel_faults(index, fast=True, num_workers=1)
    write_pixels(index, num_workers=1)
    assert contents(index.path) == before


def test_damaged_tables_and_missing_shards_are_refused(index: ShardIndex, store: PixelStore) -> None:
    table = np.load(index.path / "pixels.npy")
    table["offset"][3] = 1 << 40
    np.save(index.path / "pixels.npy", table)
    found = PixelStore.find(index)
    assert found is not None
    with pytest.raises(DataError, match="row 3 lie beyond the end"):
        found.decoded(3)
    np.save(index.path / "pixels.npy", table[:-1])
    with pytest.raises(DataError, match=r"pixels.npy: missing or damaged"):
        PixelStore.find(index)
    table["offset"][3] = store.table["offset"][3]
    np.save(index.path / "pixels.npy", table)
    (index.path / "pixels-000001.tar").unlink()
    found = PixelStore.find(index)
    assert found is not None
    found.decoded(0)
    with pytest.raises(DataError, match=r"pixels-000001.tar: cannot be read .* run orl-fast pixels again"):
        found.decoded(5)
    write_pixels(index, num_workers=1)  # writes what is missing
    assert pixel_faults(index, fast=False, num_workers=1) == []


def test_pixels_of_other_images_are_not_taken(index: ShardIndex, store: PixelStore, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards([photos], index.path, shard_size=7, num_workers=1, overwrite=True)
    other = ShardIndex.open(index.path)
    assert PixelStore.find(other) is None
    assert "are of other images; run orl-fast pixels" in caplog.text
    assert pixel_faults(other, fast=True, num_workers=1)
    with pytest.raises(StaleError, match="other images"):
        write_pixels(other, num_workers=1)
    write_pixels(other, num_workers=1, overwrite=True)
    assert pixel_faults(other, fast=False, num_workers=1) == []


def test_pixels_elsewhere_are_found_by_a_link(index: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pixels(index, tmp_path / "fast disk", num_workers=1)
    assert not list(index.path.glob("pixels-*.tar"))
    found = PixelStore.find(index)
    assert found is not None
    assert found.folder == tmp_path / "fast disk"
    shutil.rmtree(tmp_path / "fast disk")
    assert PixelStore.find(index) is None
    assert "are not there" in caplog.text
    with pytest.raises(DataError, match=r"--pixels-dir"):
        PixelStore.find(index, tmp_path / "fast disk")
    write_pixels(index, num_workers=1)
    assert PixelStore.find(index) is not None
    assert not (index.path / "pixels.link").exists()


def test_a_full_disk_leaves_nothing(index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**4))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"storing the pixels takes .* are free"):
        write_pixels(index, tmp_path / "out", num_workers=1)
    assert not list((tmp_path / "out").glob("pixels*"))


def test_a_disk_that_fills_up_is_resumed(index: ShardIndex, tmp_path: Path) -> None:
    """The kernel refuses to let files grow, as a full disk does."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from orl_fast.shards import ShardIndex\n"
        "from orl_fast.shards.pixels import write_pixels; from orl_fast.errors import DataError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "index = ShardIndex.open(Path(sys.argv[1])); resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))\n"
        "write_pixels(index, Path(sys.argv[2]), num_workers=1)"
    )
    done = subprocess.run([sys.executable, "-c", code, index.path, tmp_path / "out"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode != 0
    assert not list((tmp_path / "out").glob("*.partial"))
    assert PixelStore.find(index) is None
    info = write_pixels(index, tmp_path / "out", num_workers=1)
    assert json.loads((tmp_path / "out" / "pixels.json").read_text())["num_stored"] == info.num_stored == len(index)


def test_an_image_that_has_been_damaged_since_is_not_stored(index: ShardIndex) -> None:
    data = bytearray(index.shard_paths[1].read_bytes())
    start, size = int(index.offsets[6]), int(index.sizes[6])
    data[start : start + size] = bytes(size)
    index.shard_paths[1].write_bytes(data)
    with pytest.raises(DataError, match=rf"image {index.keys[6]}: its JPEG cannot be decoded any more; run orl-fast verify"):
        write_pixels(index, num_workers=1)
    assert PixelStore.find(index) is None


@pytest.mark.parametrize("settings", [{"budget_bytes": 0}, {"max_side": 0}, {"num_workers": 0}])
def test_numbers_below_one_are_refused(settings: dict[str, int], index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_pixels(index, **settings)  # type: ignore[arg-type]
