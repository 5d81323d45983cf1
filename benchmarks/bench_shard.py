"""Packing, opening and random reading, each against what one would use otherwise.

- pack: one process. The baseline checks as we do (a full decode by Pillow) and writes with webdataset's TarWriter, without checksums, index
  or syncing to disk; `tar` alone checks nothing.
- open: an index of ten million images against loading the same table. The name gives the growth of the process's memory.
- read: JPEGs in random order. The baseline opens files by name; webdataset can only read in order.
"""

import io
import json
import mmap
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from benchmarks.harness import Contender, Row, compare
from benchmarks.photographs import load_jpegs
from orl_fast.shards import Manifest, ShardIndex, ShardReader, write_shards
from orl_fast.shards import reader as reader_module
from orl_fast.shards.index import INDEX_NAME, NAMES_NAME, ROW, SHARD, SHARDS_NAME


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """Rows in the groups pack, open and read. Writes up to 2 GB into the temporary folder and removes them."""
    jpegs = load_jpegs(source, limit=32 if quick else 256)
    with tempfile.TemporaryDirectory(prefix="orl-fast-bench-") as name:
        folder = Path(name)
        photos = _photographs(folder / "photos", jpegs, num_images=len(jpegs))
        rows = _pack(photos, folder, rounds=2 if quick else 7)
        rows += _open(folder / "large", num_images=100_000 if quick else 10_000_000, rounds=3 if quick else 7)
        many = _photographs(folder / "many", jpegs, num_images=200 if quick else 4000)
        return rows + _read(many, folder, rounds=2 if quick else 7)


def _photographs(folder: Path, jpegs: list[bytes], *, num_images: int) -> Path:
    folder.mkdir()
    for i in range(num_images):
        (folder / f"{i:06d}.jpg").write_bytes(jpegs[i % len(jpegs)])
    return folder


def _pack(photos: Path, folder: Path, *, rounds: int) -> list[Row]:
    paths = sorted(photos.iterdir())

    def with_webdataset() -> float:
        with webdataset.TarWriter(str(folder / "webdataset.tar"), encoder=False) as writer:
            for path in paths:
                jpeg = path.read_bytes()
                with Image.open(io.BytesIO(jpeg)) as image:
                    image.load()
                    about = {"file_name": path.name, "width": image.width, "height": image.height}
                writer.write({"__key__": path.stem, "jpg": jpeg, "json": json.dumps(about).encode()})
        return len(paths)

    def with_orl_fast() -> float:
        shutil.rmtree(folder / "packed", ignore_errors=True)
        return write_shards([photos], folder / "packed", num_workers=1).num_images

    def with_tar() -> float:
        subprocess.run(["tar", "-cf", folder / "plain.tar", "-C", photos, "."], check=True)
        return len(paths)

    contenders = [
        Contender(name="Pillow + webdataset.TarWriter", run=with_webdataset),
        Contender(name="orl-fast shard, 1 worker", run=with_orl_fast),
        Contender(name="tar (copies, checks nothing)", run=with_tar),
    ]
    return compare(contenders, unit="images/s", rounds=rounds, group="pack")


def _open(folder: Path, *, num_images: int, rounds: int) -> list[Row]:
    _large_index(folder, num_images=num_images)
    before = _memory_bytes()
    index = ShardIndex.open(folder)
    assert index.keys[num_images - 1] == "k"
    grown_mb = (_memory_bytes() - before) / 1e6
    del index

    def load_table() -> float:
        assert len(np.load(folder / INDEX_NAME)) == num_images
        return 1

    def open_index() -> float:
        assert len(ShardIndex.open(folder)) == num_images
        return 1

    contenders = [
        Contender(name=f"numpy.load, {num_images:,} images", run=load_table),
        Contender(name=f"ShardIndex.open, {num_images:,} images (+{grown_mb:.0f} MB)", run=open_index),
    ]
    return compare(contenders, unit="opens/s", rounds=rounds, group="open")


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _large_index(folder: Path, *, num_images: int) -> None:
    """Index, names and manifest as if so many images were packed, 256 to a shard; the shards themselves are not needed to open it."""
    folder.mkdir()
    rows = np.lib.format.open_memmap(folder / INDEX_NAME, "w+", ROW, (num_images,))
    rows["name_end"] = 14 * np.arange(1, num_images + 1)
    rows.flush()
    (folder / NAMES_NAME).write_bytes(b"k\0file_name.jpg"[:14] * num_images)
    first_rows = np.arange(0, num_images, 256)
    shards = np.zeros(len(first_rows), SHARD)
    shards["first_row"] = first_rows
    np.save(folder / SHARDS_NAME, shards)
    Manifest(
        fingerprint="0" * 32,
        num_images=num_images,
        num_shards=len(shards),
        num_bytes=0,
        num_original=num_images,
        reencoded={},
        quarantined=(),
        sources=(),
        inputs="",
    ).write(folder)


def _read(photos: Path, folder: Path, *, rounds: int) -> list[Row]:
    paths = sorted(photos.iterdir())
    write_shards([photos], folder / "shards-of-256")
    write_shards([photos], folder / "shards-of-8", shard_size=8)
    order = random.Random(0).sample(range(len(paths)), len(paths))

    def reading(read: Callable[[int], object]) -> float:
        for i in order:
            read(i)
        return len(order)

    def in_order(shards: list[Path]) -> float:
        def samples() -> Iterator[object]:
            yield from webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)

        return sum(1 for _ in samples())

    index, small = ShardIndex.open(folder / "shards-of-256"), ShardIndex.open(folder / "shards-of-8")
    maps = f"{small.num_shards} shards, at most {reader_module._max_open_maps()} mapped"
    with ShardReader(index) as reader, ShardReader(small) as small_reader:
        contenders = [
            Contender(name="open(path).read()", run=partial(reading, lambda i: paths[i].read_bytes())),
            Contender(name="ShardReader.read", run=partial(reading, reader.read)),
            Contender(name="ShardReader.view, every page touched", run=partial(reading, lambda i: reader.view(i)[::4096].sum())),
            Contender(name=f"ShardReader.read, {maps}", run=partial(reading, small_reader.read)),
            Contender(name="webdataset, in order", run=partial(in_order, index.shard_paths)),
        ]
        return compare(contenders, unit="images/s", rounds=rounds, group="read")
