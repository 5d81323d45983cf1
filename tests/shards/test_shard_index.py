import gc
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from odd_images import draw_image, encoded

from orl_fast.errors import DataError
from orl_fast.shards import ShardIndex, ShardReader, reader, write_shards


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_columns_have_the_promised_types(packed):
    index = ShardIndex.open(packed)
    assert len(index) == 23
    assert index.num_shards == len(index.shard_paths) == 5
    promised = {"heights": "i4", "widths": "i4", "shard_ids": "i4", "image_ids": "i8", "offsets": "i8", "sizes": "i8"}
    for column, dtype in promised.items():
        array = getattr(index, column)
        assert (array.shape, array.dtype, type(array)) == ((23,), np.dtype(dtype), np.ndarray)
    assert [row for shard in range(5) for row in index.shard_rows(shard)] == list(range(23))
    assert [int(index.shard_ids[row]) for shard in range(5) for row in index.shard_rows(shard)] == index.shard_ids.tolist()
    with pytest.raises(IndexError):
        index.shard_rows(5)


def test_names_behave_as_sequences(packed):
    index = ShardIndex.open(packed)
    keys = list(index.keys)
    assert len(keys) == len(index.keys) == 23
    assert keys[0] == "dir0_image_00"
    assert index.file_names[0] == "dir0/image 00.JPG"
    assert (index.keys[-1], index.keys[3:9:2], index.keys.index(keys[4])) == (keys[-1], keys[3:9:2], 4)
    with pytest.raises(IndexError):
        index.keys[23]


def test_index_and_reader_travel_to_other_processes(packed):
    index = ShardIndex.open(packed)
    with ShardReader(index) as first, pickle.loads(pickle.dumps(ShardReader(index))) as second:
        assert second.index.fingerprint == index.fingerprint
        assert first.read(7) == second.read(7)
    assert len(pickle.dumps(index)) < 1000


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "file", "json", "version", "field", "no index", "rows", "pickle", "no names", "names"]
)
def test_other_folders_are_explained(packed, tmp_path, damage):
    path, match = packed, "pack"
    manifest = packed / "manifest.json"
    if damage == "missing":
        path = tmp_path / "nowhere"
    elif damage == "empty":
        path = tmp_path / "empty"
        path.mkdir()
    elif damage == "file":
        path, match = manifest, "is a file"
    elif damage == "json":
        manifest.write_text("{")
    elif damage in ("version", "field"):
        values = json.loads(manifest.read_text())
        if damage == "version":
            values["version"], match = 99, "version 99"
        else:
            del values["fingerprint"]
        manifest.write_text(json.dumps(values))
    elif damage == "no index":
        (packed / "index.npy").unlink()
    elif damage == "rows":
        np.save(packed / "index.npy", np.load(packed / "index.npy")[:-1])
    elif damage == "pickle":
        np.save(packed / "index.npy", np.array([{}]), allow_pickle=True)
    elif damage == "no names":
        (packed / "names.bin").unlink()
    else:
        (packed / "names.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=match):
        ShardIndex.open(path)


def test_fingerprint_names_the_content(photos, packed, tmp_path):
    fingerprint = ShardIndex.open(packed).fingerprint
    moved = photos.rename(tmp_path / "elsewhere")
    assert write_shards([moved], tmp_path / "again", shard_size=5, num_workers=1).fingerprint == fingerprint
    (moved / "dir0" / "image 00.JPG").write_bytes(encoded(draw_image(77)))
    assert write_shards([moved], tmp_path / "changed", shard_size=5, num_workers=1).fingerprint != fingerprint


def test_views_are_read_only_and_outlive_the_reader(packed):
    index = ShardIndex.open(packed)
    before = open_files()
    reader = ShardReader(index)
    expected = [reader.read(i) for i in range(len(index))]
    view = reader.view(4)
    assert view.dtype == np.uint8
    assert not view.flags.writeable
    assert not view.flags.owndata
    reader.close()
    assert open_files() == before + 1
    assert view.tobytes() == expected[4]
    del view
    assert open_files() == before
    with pytest.raises(ValueError, match="closed"):
        reader.read(0)


def test_rows_outside_are_refused(packed):
    with ShardReader(ShardIndex.open(packed)) as reader:
        for row in (-1, 23):
            with pytest.raises(IndexError, match="of 23"):
                reader.view(row)


def test_few_maps_stay_open(packed, monkeypatch):
    monkeypatch.setattr(reader, "_max_open_maps", lambda: 2)
    index = ShardIndex.open(packed)
    expected = [index.shard_paths[s].read_bytes()[o : o + n] for s, o, n in zip(index.shard_ids, index.offsets, index.sizes, strict=True)]
    before = open_files()
    with ShardReader(index) as few:
        for row in np.random.default_rng(0).integers(0, 23, 300):
            assert few.read(int(row)) == expected[row]
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert open_files() == before


@pytest.mark.parametrize(("soft", "hard", "maps"), [(256, 4096, 2048), (1024, 1024, 512), (20, 20, 16), (1024, 10**6, 4096)])
def test_the_first_reader_raises_the_limit_of_open_files(packed, soft, hard, maps):
    """COCO has 463 shards. Importing the reader changes nothing."""
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, min({hard}, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
from pathlib import Path
from orl_fast.shards import ShardIndex, ShardReader, reader
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == {soft}
ShardReader(ShardIndex.open(Path({str(packed)!r}))).read(22)
print(reader._max_open_maps(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < min(hard, 16_384):
        pytest.skip("the hard limit is lower here")
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert found[:2] == [str(maps), str(min(hard, 16_384))]


def test_many_rows_are_read_at_once(packed):
    with ShardReader(ShardIndex.open(packed)) as reader:
        for rows in ([22, 0, 7, 7], np.array([3, 19]), []):
            views = reader.views(rows)
            assert [view.tobytes() for view in views] == [reader.read(int(row)) for row in rows]
            assert not any(view.flags.owndata for view in views)
        with pytest.raises(IndexError, match="row 23"):
            reader.views([0, 23])


def test_threads_share_a_reader(packed, monkeypatch):
    monkeypatch.setattr(reader, "_max_open_maps", lambda: 2)
    index = ShardIndex.open(packed)
    with ShardReader(index) as shared, ThreadPoolExecutor(8) as pool:
        expected = [shared.read(i) for i in range(23)]
        start = threading.Barrier(8)

        def work(seed: int) -> bool:
            start.wait()
            return all(shared.read(int(row)) == expected[row] for row in np.random.default_rng(seed).integers(0, 23, 500))

        assert all(pool.map(work, range(8)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns where libraries run threads
def test_a_reader_survives_a_fork(packed):
    index = ShardIndex.open(packed)
    with ShardReader(index) as shared:
        expected = [shared.read(i) for i in range(23)][::-1]
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if [shared.read(i) for i in range(23)][::-1] == expected else 2
            finally:
                os._exit(status)
        os.close(read_end)
        os.close(write_end)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _read_all(reader: ShardReader) -> list[bytes]:
    return [reader.read(i) for i in range(len(reader.index))]


def test_a_reader_can_be_sent_to_a_spawned_process(packed):
    with ShardReader(ShardIndex.open(packed)) as shared, multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_all, (shared,)) == _read_all(shared)


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "empty"])
def test_damaged_shards_are_reported_before_they_are_read(packed, damage):
    index = ShardIndex.open(packed)
    path = index.shard_paths[1]
    if damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    before = open_files()
    with ShardReader(index) as reader:
        assert reader.read(0)
        with pytest.raises(DataError, match=r"images-000001\.tar.*--overwrite"):
            reader.read(5)
    assert open_files() == before
