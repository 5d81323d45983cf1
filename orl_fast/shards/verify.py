"""Check a shard folder: its checksums, its tar files, and that all tables tell the same."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from orl_fast.console import progress
from orl_fast.shards.images import BadImage, packed_image
from orl_fast.shards.index import ShardIndex
from orl_fast.shards.manifest import INDEX_NAME, MANIFEST_NAME, SHARDS_NAME, fingerprint_of
from orl_fast.shards.workers import num_cores, run_in_workers

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with one file."""

    file: Path
    message: str


def verify_shards(folder: Path, *, fast: bool = False, decode: bool = False, num_workers: int | None = None) -> list[Fault]:
    """Check everything that `write_shards` promises, and that column shards (pairs-*.tar) are aligned with the images.

    Args:
        fast: compare sizes and tables only; the image shards themselves are not read.
        decode: decode every image once more.
        num_workers: processes; default one per core.
    Returns:
        The faults found; empty if all is well.
    Raises:
        DataError: the folder cannot be opened at all (see ShardIndex.open).
    """
    index = ShardIndex.open(folder)
    faults = [*_index_faults(index), *_column_faults(index)]
    if any(fault.file.name == INDEX_NAME for fault in faults):
        return faults  # what it tells about the shards is of no use
    tasks = (_task(index, shard, fast=fast, decode=decode) for shard in range(index.num_shards))
    workers = 1 if fast else min(num_workers or num_cores(), index.num_shards)
    with progress("verify", total=index.num_shards, unit="shards") as advance:
        for found in run_in_workers(_shard_faults, tasks, num_workers=workers):
            faults += found
            advance()
    return sorted(faults, key=lambda fault: fault.file)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard and what the index tells about it."""

    path: Path
    num_bytes: int
    sha256: str
    keys: list[str]
    about: list[dict[str, str | int]]  # what {key}.json should hold
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    fast: bool
    decode: bool


def _task(index: ShardIndex, shard: int, *, fast: bool, decode: bool) -> _Task:
    rows = index.shard_rows(shard)
    part = slice(rows.start, rows.stop)
    columns = zip(index.file_names[part], index.image_ids[part], index.widths[part], index.heights[part], strict=True)
    return _Task(
        path=index.shard_paths[shard],
        num_bytes=int(index.shards["num_bytes"][shard]),
        sha256=index.shards["sha256"][shard].decode(),
        keys=list(index.keys[part]),
        about=[{"file_name": name, "image_id": int(id_), "width": int(w), "height": int(h)} for name, id_, w, h in columns],
        offsets=index.offsets[part],
        sizes=index.sizes[part],
        fast=fast,
        decode=decode,
    )


def _index_faults(index: ShardIndex) -> Iterator[Fault]:
    if index.fingerprint != fingerprint_of(index.shards["sha256"].tolist()):
        yield Fault(file=index.path / MANIFEST_NAME, message="the fingerprint does not follow from the checksums of the shards")
    counts = np.diff(index.shards["first_row"], append=len(index))
    if index.shards["first_row"][0] != 0 or counts.min() < 1 or not np.array_equal(index.shard_ids, np.repeat(range(len(counts)), counts)):
        yield Fault(file=index.path / INDEX_NAME, message=f"its shards do not follow one another as {SHARDS_NAME} tells")
        return
    limits = index.shards["num_bytes"][index.shard_ids]
    outside = (index.offsets < 0) | (index.sizes < 1) | (index.offsets + index.sizes > limits) | (index.heights < 1) | (index.widths < 1)
    if outside.any():
        yield Fault(file=index.path / INDEX_NAME, message=f"row {outside.argmax()} cannot be: it lies outside its shard or has no pixels")


def _column_faults(index: ShardIndex) -> Iterator[Fault]:
    """Column shards hold some component of every key of the image shard with their number, in its order."""
    for path in sorted(index.path.rglob("pairs-??????.tar")):
        shard = int(path.stem.partition("-")[2])
        try:
            with tarfile.open(path) as tar:
                keys = [key for key, _ in groupby(name.partition(".")[0] for name in tar.getnames())]
        except (OSError, tarfile.TarError) as error:
            yield Fault(file=path, message=f"cannot be read as a tar file ({error}); run orl-fast mine pairs")
            continue
        rows = index.shard_rows(shard) if shard < index.num_shards else range(0)
        if keys != index.keys[rows.start : rows.stop]:
            yield Fault(file=path, message="its keys are not those of the image shard with its number; run orl-fast mine pairs")


def _shard_faults(task: _Task) -> list[Fault]:
    """Check one shard. Runs in a worker process."""
    try:
        return [Fault(file=path, message=message) for path, message in _messages(task)]
    except (OSError, tarfile.TarError, ValueError) as error:
        return [Fault(file=task.path, message=f"cannot be read ({error})")]


def _messages(task: _Task) -> Iterator[tuple[Path, str]]:
    if not task.path.is_file():
        yield task.path, "is missing"
        return
    num_bytes = task.path.stat().st_size
    if num_bytes != task.num_bytes:
        yield task.path, f"has {num_bytes} bytes, was packed with {task.num_bytes}"
        return
    idx = task.path.with_suffix(".idx")
    lines = idx.read_text().splitlines() if idx.is_file() else []
    begins = [f"jpg {offset} {size} {key}.jpg json " for offset, size, key in zip(task.offsets, task.sizes, task.keys, strict=True)]
    begins.insert(0, f"v1.2 {len(task.keys)}")
    if len(lines) != len(begins) or not all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)):
        yield idx, "is missing, or tells other images or places than the index"
    if task.fast:
        return
    with task.path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != task.sha256:
            yield task.path, "its bytes are not those that were packed (SHA-256)"
        file.seek(0)
        yield from ((task.path, message) for message in _tar_messages(file, task))


def _tar_messages(file: BinaryIO, task: _Task) -> Iterator[str]:
    """Compare every member with the index."""
    with tarfile.open(fileobj=file) as tar:
        members = [(member.name, member.offset_data, member.size) for member in tar]
    if [name for name, _, _ in members] != [f"{key}.{suffix}" for key in task.keys for suffix in ("jpg", "json")]:
        yield "its members are not the images that the index tells, in its order"
        return
    jpegs, texts = members[::2], members[1::2]
    for i, ((name, *place), (_, start, size)) in enumerate(zip(jpegs, texts, strict=True)):
        if place != [task.offsets[i], task.sizes[i]]:
            yield f"{name}: lies elsewhere than the index tells"
            continue
        file.seek(start)
        if json.loads(file.read(size)) != task.about[i]:
            yield f"{task.keys[i]}.json: tells otherwise than the index"
        if task.decode:
            file.seek(place[0])
            try:
                image = packed_image(file.read(place[1]))
            except BadImage as error:
                yield f"{name}: {error}"
                continue
            if image.reencoded or (image.width, image.height) != (task.about[i]["width"], task.about[i]["height"]):
                yield f"{name}: is not the plain JPEG that the index tells ({image.width} x {image.height} {image.reencoded or ''})"
