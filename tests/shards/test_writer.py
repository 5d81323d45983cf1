import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from odd_images import draw_image, encoded
from PIL import ImageFile

from orl_fast.errors import DataError, StaleError
from orl_fast.files import locked
from orl_fast.shards import Manifest, ShardIndex, ShardReader, workers, write_shards, writer
from orl_fast.shards.sources import find_sources, list_images
from orl_fast.shards.verify import verify_shards
from orl_fast.shards.workers import run_in_workers


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_originals_are_kept_in_order(photos, packed):
    index = ShardIndex.open(packed)
    listing = list_images(find_sources([photos]))
    assert [(image.file_name, image.key, image.image_id) for image in listing.images] == list(
        zip(index.file_names, index.keys, index.image_ids.tolist(), strict=True)
    )
    assert [len(index.shard_rows(shard)) for shard in range(index.num_shards)] == [5, 5, 5, 5, 3]
    with ShardReader(index) as reader:
        for i, name in enumerate(index.file_names):
            assert reader.read(i) == (photos / name).read_bytes()
            number = int(name[-6:-4])
            assert (index.widths[i], index.heights[i]) == (20 + number, 50 - number)


def test_real_photographs_keep_every_byte(coco128, tmp_path):
    manifest = write_shards([coco128], tmp_path / "coco", shard_size=50, num_workers=1)
    assert (manifest.num_original, manifest.reencoded, manifest.quarantined) == (128, {}, ())
    document = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    index = ShardIndex.open(tmp_path / "coco")
    assert [(i["id"], i["width"], i["height"], i["file_name"]) for i in document["images"]] == list(
        zip(index.image_ids, index.widths, index.heights, index.file_names, strict=True)
    )
    with ShardReader(index) as reader:
        assert all(reader.read(i) == (coco128 / "train2017" / name).read_bytes() for i, name in enumerate(index.file_names))


def test_bytes_do_not_depend_on_the_number_of_workers(photos, packed, tmp_path):
    (photos / "dir0" / "bad.jpg").write_bytes(b"garbage")
    one, three = tmp_path / "one", tmp_path / "three"
    write_shards([photos], one, shard_size=5, num_workers=1)
    write_shards([photos], three, shard_size=5, num_workers=3)
    assert contents(one) == contents(three)
    assert sorted(contents(one)) == sorted(
        [f"images-{i:06d}.{suffix}" for i in range(5) for suffix in ("idx", "tar")]
        + [".lock", "index.npy", "manifest.json", "names.bin", "shards.npy"]
    )


@pytest.mark.parametrize("failing_call", range(1, 37, 2))
def test_a_run_stopped_anywhere_is_resumed_to_the_same_bytes(photos, tmp_path, monkeypatch, failing_call):
    """Stop at one rename after the other. The second of four shards holds no good image, so that the others move up."""
    for i in range(5, 10):
        (photos / f"0{i}").mkdir()
        (photos / f"0{i}" / "bad.jpg").write_bytes(b"x")
    for i in range(5):
        shutil.copy(photos / "dir0" / "image 00.JPG", photos / f"00{i}.jpg")
    shutil.rmtree(photos / "dir0")
    straight = tmp_path / "straight"
    write_shards([photos], straight, shard_size=5, num_workers=1)
    assert ShardIndex.open(straight).num_shards == 4
    rename, calls = Path.replace, 0

    def stop(self, target):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return rename(self, target)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        try:
            write_shards([photos], out, shard_size=5, num_workers=1)
        except KeyboardInterrupt:
            assert not (out / "manifest.json").exists()
        else:
            assert calls < failing_call
    write_shards([photos], out, shard_size=5, num_workers=1)
    assert contents(out) == contents(straight)


def test_a_killed_run_is_resumed_to_the_same_bytes(photos, tmp_path):
    """SIGKILL to the parent while its workers write: they exit by themselves, and finished shards are kept."""
    photo = encoded(draw_image(0, width=500, height=400), quality=95)
    for i in range(160):
        (photos / f"more{i:03d}.jpg").write_bytes(photo + bytes([i % 256]))
    out, straight = tmp_path / "out", tmp_path / "straight"
    script = "from pathlib import Path; import sys; from orl_fast.shards import write_shards\n"
    script += "if __name__ == '__main__': write_shards([Path(sys.argv[1])], Path(sys.argv[2]), shard_size=4, num_workers=2)"
    path = tmp_path / "run.py"
    path.write_text(script)
    process = subprocess.Popen([sys.executable, path, photos, out], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(list(out.glob(".work/*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("images-*.tar") if (out / ".work" / f"{path.stem[7:]}.json").exists()}
    deadline = time.monotonic() + 20
    while True:  # until the killed run's workers, which may still be writing, have exited
        try:
            write_shards([photos], out, shard_size=4, num_workers=1)
            break
        except DataError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    write_shards([photos], straight, shard_size=4, num_workers=1)
    assert contents(out) == contents(straight)
    assert len(done) >= 3
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in done.items())


def test_one_source_may_stand_alone_and_as_text(photos, packed, tmp_path):
    write_shards(str(photos), str(tmp_path / "again"), shard_size=5, num_workers=1)
    assert contents(tmp_path / "again") == contents(packed)


def test_finished_folders_are_left_alone(photos, packed, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    monkeypatch.setattr(writer, "_pack_shard", None)
    manifest = write_shards([photos], packed, shard_size=5)
    assert manifest == Manifest.read(packed)
    assert before == {path: path.stat().st_mtime_ns for path in packed.iterdir()}


def test_lost_files_are_packed_again(photos, packed):
    before = contents(packed)
    (packed / "images-000002.tar").write_bytes(b"short")
    (packed / "index.npy").unlink()
    write_shards([photos], packed, shard_size=5, num_workers=1)
    assert contents(packed) == before


def test_overwriting_fixes_what_only_verify_can_see(photos, packed):
    before = contents(packed)
    (packed / "images-000002.tar").write_bytes(bytes(len(before["images-000002.tar"])))
    write_shards([photos], packed, shard_size=5, num_workers=1)
    assert contents(packed) != before
    write_shards([photos], packed, shard_size=5, num_workers=1, overwrite=True)
    assert contents(packed) == before


def test_a_run_killed_after_its_last_file_is_finished(photos, packed):
    before = contents(packed)
    (packed / ".work").mkdir()
    (packed / ".work" / "000000.json").write_text("{}")
    write_shards([photos], packed, shard_size=5, num_workers=1)
    assert contents(packed) == before


@pytest.mark.parametrize("change", ["added", "removed", "grown", "shard_size"])
def test_other_inputs_are_refused_unless_overwritten(photos, packed, tmp_path, change):
    size = 5
    if change == "added":
        shutil.copy(photos / "dir0" / "image 00.JPG", photos / "another.jpg")
    elif change == "removed":
        (photos / "dir0" / "image 00.JPG").unlink()
    elif change == "grown":
        (photos / "dir0" / "image 00.JPG").write_bytes(encoded(draw_image(99, width=99)))
    else:
        size = 6
    before = contents(packed)
    (packed / "mined").mkdir()
    (packed / "mined" / "table.npy").write_bytes(b"others' work")
    with pytest.raises(StaleError, match="--overwrite"):
        write_shards([photos], packed, shard_size=size, num_workers=1)
    assert contents(packed).items() >= before.items()
    write_shards([photos], packed, shard_size=size, num_workers=1, overwrite=True)
    write_shards([photos], tmp_path / "fresh", shard_size=size, num_workers=1)
    assert contents(packed) == {**contents(tmp_path / "fresh"), "mined/table.npy": b"others' work"}


def test_an_interrupted_overwrite_is_resumed(photos, packed, monkeypatch):
    before = contents(packed)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_shards([photos], packed, shard_size=5, num_workers=1, overwrite=True)
    done = {path: path.stat().st_mtime_ns for path in packed.glob("*.tar")}
    assert len(done) == 5
    write_shards([photos], packed, shard_size=5, num_workers=1, overwrite=True)
    assert done == {path: path.stat().st_mtime_ns for path in packed.glob("*.tar")}
    assert contents(packed) == before


def test_an_unfinished_packing_of_other_images_is_refused(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_shards([photos], out, shard_size=5, num_workers=1)
    with pytest.raises(DataError, match="not finished"):
        ShardIndex.open(out)
    (photos / "x.jpg").write_bytes(encoded(draw_image(1)))
    with pytest.raises(StaleError, match="unfinished"):
        write_shards([photos], out, shard_size=5, num_workers=1)
    write_shards([photos], out, shard_size=5, num_workers=1, overwrite=True)
    assert len(ShardIndex.open(out)) == 24


def test_bad_images_are_quarantined_with_their_reasons(photos, tmp_path):
    good = (photos / "dir0" / "image 00.JPG").read_bytes()
    bad = {"0 empty.jpg": b"", "1 text.jpg": b"hello", "2 half.jpg": good[: len(good) // 2], "dir1/\udcff line\n.png": b"\x89PNG"}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    (photos / "3 lost.jpg").symlink_to("nowhere")
    (photos / "4 png.jpg").write_bytes(encoded(draw_image(4), "PNG"))
    out = tmp_path / "out"
    manifest = write_shards([photos], out, shard_size=3, num_workers=2)
    reasons = {entry.file_name: entry.reason for entry in manifest.quarantined}
    assert set(reasons) == {*bad, "3 lost.jpg"}
    assert reasons["0 empty.jpg"] == "the file is empty"
    assert reasons["1 text.jpg"] == "not an image of a known format"
    assert "runcated" in reasons["2 half.jpg"]
    assert reasons["3 lost.jpg"] == "cannot be read: No such file or directory"
    assert manifest.reencoded == {"PNG": 1}
    assert (manifest.num_images, manifest.num_original) == (24, 23)
    assert Manifest.read(out) == manifest
    index = ShardIndex.open(out)
    assert index.shard_rows(0) == range(0, 3)  # the first three images were all bad: the next shard has their number
    assert sorted(out.glob("images-*.tar")) == index.shard_paths
    assert index.num_shards == 9
    assert verify_shards(out, decode=True, num_workers=1) == []
    assert index.file_names[0] == "4 png.jpg"
    assert index.image_ids[0] == 3  # its place in the listing: ids do not shift when an image is bad


def test_nothing_is_left_when_every_image_is_bad(tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 3 images can be decoded \(0.jpg: not an image"):
        write_shards([tmp_path / "bad"], tmp_path / "new" / "out", shard_size=2, num_workers=1)
    assert os.listdir(tmp_path) == ["bad"]


def test_a_full_disk_is_reported_and_leaves_nothing(photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="free some space"):
        write_shards([photos], tmp_path / "new" / "out", num_workers=1)
    assert os.listdir(tmp_path) == ["photos"]


def test_folders_that_cannot_be_used_are_explained(photos, tmp_path):
    with pytest.raises(DataError, match="lies within the source"):
        write_shards([photos], photos / "dir0" / "out")
    with pytest.raises(DataError, match="lies within the source"):
        write_shards([photos], photos)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        write_shards([photos], tmp_path / "file")
    with pytest.raises(DataError, match="cannot be written"):
        write_shards([photos], tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        write_shards([photos], tmp_path / "full", overwrite=True)
    for source, message in (("nowhere", "no such folder"), ("file", "is a file"), ("full", "holds no images")):
        with pytest.raises(DataError, match=message):
            write_shards([tmp_path / source], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "photos"]
    with pytest.raises(ValueError, match="at least 1"):
        write_shards([photos], tmp_path / "out", shard_size=0)


PACK = """
import sys
from pathlib import Path
from orl_fast.shards import write_shards
write_shards([Path(sys.argv[1])], Path(sys.argv[2]), shard_size=5, num_workers=1, overwrite=True)
"""


def test_two_runs_do_not_write_one_folder(photos, packed):
    before = contents(packed)
    with locked(packed, what="orl-fast shard"):
        with pytest.raises(DataError, match=r"orl-fast shard \(process .*\) is writing here; wait"):
            write_shards([photos], packed, shard_size=5, num_workers=1, overwrite=True)
        write_shards([photos], packed, shard_size=5)  # up to date, so there is nothing to write
    assert contents(packed) == before


def test_a_run_that_waited_for_another_keeps_what_that_one_packed(photos, packed, tmp_path, monkeypatch):
    """The other run, from start to end, happens between our opening the lock file and our locking it."""
    out, flock = tmp_path / "out", fcntl.flock
    (out / ".work").mkdir(parents=True)

    def slow_flock(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        subprocess.run([sys.executable, "-c", PACK, photos, out], check=True)
        assert not (out / ".work").exists()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    assert write_shards([photos], out, shard_size=5, num_workers=1) == Manifest.read(packed)
    assert fcntl.flock is flock
    assert contents(out) == contents(packed)


def test_leftovers_of_killed_writers_are_removed(photos, packed, tmp_path):
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    for folder in (out, out / ".work"):
        (folder / f"images-000000.tar.{'0' * 16}.partial").write_bytes(b"half")
    write_shards([photos], out, shard_size=5, num_workers=1)
    assert contents(out) == contents(packed)


def test_an_image_that_takes_too_much_memory_is_quarantined(photos, tmp_path, monkeypatch):
    load, name = ImageFile.ImageFile.load, "image 04.JPG"

    def hungry(self):
        if self.size == (24, 46):
            raise MemoryError
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", hungry)
    manifest = write_shards([photos], tmp_path / "out", num_workers=1)
    assert [(entry.file_name, entry.reason.split(":")[0]) for entry in manifest.quarantined] == [(f"dir1/{name}", "too large")]
    assert manifest.num_images == 22


def test_shards_end_at_their_bytes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 4000)
    write_shards([photos], tmp_path / "out", num_workers=1)
    index = ShardIndex.open(tmp_path / "out")
    sums = [sum(index.sizes[list(index.shard_rows(shard))]) for shard in range(index.num_shards)]
    assert max(sums) <= 4000
    assert all(sums[i] + index.sizes[index.shard_rows(i + 1)[0]] > 4000 for i in range(len(sums) - 1))


def _die(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_killed_worker_is_reported():
    with pytest.raises(DataError, match="fewer --workers"):
        list(run_in_workers(_die, range(5), num_workers=2))


def test_without_shared_semaphores_one_process_works(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", refuse)
    warnings: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("orl_fast"), "handle", warnings.append)
    assert list(run_in_workers(abs, range(-3, 0), num_workers=4)) == [3, 2, 1]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "/dev/shm" in warnings[0].getMessage()
