"""Check a dataset: checksums, tar files, and that all tables agree."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from orl_fast.console import progress
from orl_fast.cores import num_cores
from orl_fast.shards.images import BadImage, packed_image
from orl_fast.shards.index import INDEX_NAME, MANIFEST_NAME, SHARDS_NAME, ShardIndex, fingerprint_of, tar_path
from orl_fast.shards.pixels import pixel_faults
from orl_fast.shards.workers import run_in_workers

Fault = tuple[Path, str]  # a file, and one thing that is wrong with it


def verify_shards(folder: Path, *, fast: bool = False, decode: bool = False, num_workers: int | None = None) -> list[Fault]:
    """Find what violates the guarantees of `write_shards`, column shards (pairs-*.tar) that are not aligned with the
    images, and damaged pixels.

    With `fast`, only compare sizes and tables, without reading the image shards; with `decode`, also decode every image. Processes: by
    default one per core. DataError if the dataset cannot be opened (see ShardIndex.open).
    """
    index = ShardIndex.open(folder)
    faults = [*_index_faults(index), *_column_faults(index)]
    if any(file.name == INDEX_NAME for file, _ in faults):
        return faults  # the shards cannot be checked against a wrong index
    check = partial(_check_shard, index, fast=fast, decode=decode)  # the index is pickled as its path
    workers = 1 if fast else min(num_workers or num_cores(), index.num_shards)
    with progress("verify", total=index.num_shards, unit="shards") as advance:
        for found in run_in_workers(check, range(index.num_shards), num_workers=workers):
            faults += found
            advance()
    faults += pixel_faults(index, fast=fast, num_workers=num_workers or num_cores())
    return sorted(faults, key=itemgetter(0))


def _index_faults(index: ShardIndex) -> Iterator[Fault]:
    if index.fingerprint != fingerprint_of(index.shards["sha256"].tolist()):
        yield index.path / MANIFEST_NAME, "the fingerprint does not match the checksums of the shards"
    counts = np.diff(index.shards["first_row"], append=len(index))
    if index.shards["first_row"][0] != 0 or counts.min() < 1 or not np.array_equal(index.shard_ids, np.repeat(range(len(counts)), counts)):
        yield index.path / INDEX_NAME, f"the order of its shards differs from {SHARDS_NAME}"
        return
    limits = index.shards["num_bytes"][index.shard_ids]
    outside = (index.offsets < 0) | (index.sizes < 1) | (index.offsets + index.sizes > limits) | (index.heights < 1) | (index.widths < 1)
    if outside.any():
        yield index.path / INDEX_NAME, f"row {outside.argmax()} is invalid: outside its shard, or without pixels"


def _column_faults(index: ShardIndex) -> Iterator[Fault]:
    """Column shards hold components of every key of the image shard with the same number, in the same order."""
    for path in sorted(index.path.rglob(f"pairs-{'[0-9]' * 6}.tar")):
        shard = int(path.stem.partition("-")[2])
        try:
            with tarfile.open(path) as tar:
                keys = [key for key, _ in groupby(name.partition(".")[0] for name in tar.getnames())]
        except (OSError, tarfile.TarError) as error:
            yield path, f"not a tar file ({error}); run orl-fast mine pairs"
            continue
        rows = index.shard_rows(shard) if shard < index.num_shards else range(0)
        if keys != index.keys[rows.start : rows.stop]:
            yield path, f"keys do not match {path.name.replace('pairs', 'images')}; run orl-fast mine pairs"


def _check_shard(index: ShardIndex, shard: int, *, fast: bool, decode: bool) -> list[Fault]:
    """Runs in a worker process."""
    try:
        return list(_shard_faults(index, shard, fast=fast, decode=decode))
    except (OSError, tarfile.TarError, ValueError) as error:
        return [(tar_path(index.path, shard), f"cannot be read ({error})")]


def _shard_faults(index: ShardIndex, shard: int, *, fast: bool, decode: bool) -> Iterator[Fault]:
    path, rows, expected_bytes = tar_path(index.path, shard), index.shard_rows(shard), index.shards["num_bytes"][shard]
    if not path.is_file():
        yield path, "is missing"
        return
    if path.stat().st_size != expected_bytes:
        yield path, f"has {path.stat().st_size} bytes, was packed with {expected_bytes}"
        return
    idx = path.with_suffix(".idx")
    lines = idx.read_text().splitlines() if idx.is_file() else []
    begins = [f"v1.2 {len(rows)}", *(f"jpg {index.offsets[i]} {index.sizes[i]} {index.keys[i]}.jpg json " for i in rows)]
    if len(lines) != len(begins) or not all(map(str.startswith, lines, begins)):
        yield idx, "is missing, or its images or positions differ from the index"
    if not fast:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index.shards["sha256"][shard].decode():
                yield path, "its bytes have changed since it was packed (SHA-256)"
            file.seek(0)
            yield from ((path, message) for message in _member_messages(file, index, rows, decode=decode))


def _member_messages(file: BinaryIO, index: ShardIndex, rows: range, *, decode: bool) -> Iterator[str]:
    """Compare every member of a tar with the index."""
    with tarfile.open(fileobj=file) as tar:
        members = tar.getmembers()
    if [member.name for member in members] != [f"{index.keys[i]}.{suffix}" for i in rows for suffix in ("jpg", "json")]:
        yield "its members differ from the images in the index, or their order does"
        return
    for i, jpeg, text in zip(rows, members[::2], members[1::2], strict=True):
        if (jpeg.offset_data, jpeg.size) != (index.offsets[i], index.sizes[i]):
            yield f"{jpeg.name}: its position differs from the index"
            continue
        width, height = int(index.widths[i]), int(index.heights[i])
        about = {"file_name": index.file_names[i], "image_id": int(index.image_ids[i]), "width": width, "height": height}
        if json.loads(os.pread(file.fileno(), text.size, text.offset_data)) != about:
            yield f"{text.name}: differs from the index"
        if decode:
            try:
                image = packed_image(os.pread(file.fileno(), jpeg.size, jpeg.offset_data))
            except BadImage as error:
                yield f"{jpeg.name}: {error}"
                continue
            if image.reencoded or (image.width, image.height) != (width, height):
                yield f"{jpeg.name}: not the plain JPEG of the index ({image.width} x {image.height} {image.reencoded or ''})"
