"""Pack image folders into WebDataset shards. The unit of work, and of resuming, is the shard."""

import fcntl
import hashlib
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orl_fast.console import log, progress
from orl_fast.errors import DataError, StaleError
from orl_fast.files import atomic_file, require_free_space, write_array, write_json
from orl_fast.shards.images import JPEG_QUALITY, BadImage, packed_image
from orl_fast.shards.index import ROW, SHARD, ShardIndex
from orl_fast.shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    NAMES_NAME,
    SHARDS_NAME,
    VERSION,
    WORK_NAME,
    Manifest,
    Quarantined,
    SourceEntry,
    fingerprint_of,
    tar_path,
)
from orl_fast.shards.sources import ListedImage, Listing, find_sources, list_images
from orl_fast.shards.workers import num_cores, run_in_workers

BLOCK_BYTES = 512
DEFAULT_SHARD_SIZE = 256  # COCO's train2017: 463 shards of 42 MB, so that also small sets occupy several workers
MAX_SHARD_BYTES = 256_000_000
_MAX_FILE_BYTES = 1_000_000_000
_CHOICE = "add --overwrite to replace it, or choose another folder with --out"


def write_shards(
    sources: Path | Sequence[Path],
    out: Path,
    *,
    splits: Sequence[str] = (),
    shard_size: int = DEFAULT_SHARD_SIZE,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Pack the images of `sources`, in order, into the folder `out` (format: shards/FORMAT.md).

    A run that was stopped goes on where it stopped and gives the same bytes. A finished folder whose sources did not change is left alone.

    Args:
        sources: COCO roots, COCO split folders or any folders of images, or one of these.
        splits: which splits of a COCO root, instead of train2017.
        shard_size: images per shard; a shard also ends at 256 MB of source files.
        num_workers: processes that decode and write; default one per core. With more than one, a script needs the usual
            `if __name__ == "__main__"`.
        overwrite: replace what was packed into `out` from other sources or with other settings.
    Raises:
        DataError: sources are missing or hold no (good) images, `out` cannot be used, or the disk is full.
        StaleError: `out` holds another packing and `overwrite` is not set.
        ValueError: shard_size or num_workers is below 1.
    """
    if shard_size < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(f"shard_size ({shard_size}) and num_workers ({num_workers}) must be at least 1")
    out = Path(out)
    found = find_sources([Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)], splits=splits)
    for source in found:
        if out.resolve().is_relative_to(source.folder.resolve()):
            raise DataError(f"{out}: lies within the source {source.folder}; choose another folder with --out")
    listing = list_images(found)
    _tell(listing)
    inputs = hashlib.sha256(f"{VERSION} {shard_size} {MAX_SHARD_BYTES} {JPEG_QUALITY} {listing.digest()}".encode()).hexdigest()
    finished = None if overwrite else _finished(out, inputs=inputs)
    if finished is not None:
        shutil.rmtree(out / WORK_NAME, ignore_errors=True)  # left where a run was killed after its last file
        log.info("%s: up to date, %d images in %d shards", out, finished.num_images, finished.num_shards)
        return finished
    tasks = list(_tasks(listing, out, shard_size=shard_size))
    with _work_folder(out, inputs=inputs, overwrite=overwrite):
        waiting = [task for task in tasks if not task.report.exists()]
        require_free_space(out, num_bytes=sum(task.num_bytes for task in waiting), purpose="packing")
        num_done = sum(len(task.images) for task in tasks) - sum(len(task.images) for task in waiting)
        if num_done:
            log.info("%s: goes on after %d of %d images", out, num_done, len(listing.images))
        with progress("pack", total=len(listing.images), unit="images", done=num_done) as advance:
            for count in run_in_workers(_pack_shard, waiting, num_workers=min(num_workers or num_cores(), len(waiting))):
                advance(count)
        return _finish(listing, tasks, out, inputs=inputs)


def _tell(listing: Listing) -> None:
    """Say what will be packed, and what is odd about the sources."""
    for source, absent, unlisted in zip(listing.sources, listing.absent, listing.unlisted, strict=True):
        order = f"order and ids from {source.annotations}" if source.annotations else "no annotation file, ordered by path"
        log.info("%s: %s", source.folder, order)
        if absent:
            log.warning("%s: lists %d images that are not on disk, first %s", source.annotations, len(absent), absent[0])
        if unlisted:
            log.warning("%s: %d images are not in %s; they are packed after the others", source.folder, unlisted, source.annotations)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard to write."""

    out: Path
    number: int
    folders: tuple[Path, ...]
    images: list[ListedImage]

    @property
    def tar(self) -> Path:
        return tar_path(self.out, self.number)

    @property
    def report(self) -> Path:
        return self.out / WORK_NAME / f"{self.number:06d}.json"

    @property
    def num_bytes(self) -> int:
        return sum(image.num_bytes + 4 * BLOCK_BYTES for image in self.images)


def _tasks(listing: Listing, out: Path, *, shard_size: int) -> Iterator[_Task]:
    """Cut the listing by what is known before decoding, so that the cut never depends on the order of work."""
    folders = tuple(source.folder for source in listing.sources)
    start, num_bytes, number = 0, 0, 0
    for i, image in enumerate(listing.images):
        if i > start and (i - start == shard_size or num_bytes + image.num_bytes > MAX_SHARD_BYTES):
            yield _Task(out=out, number=number, folders=folders, images=listing.images[start:i])
            start, num_bytes, number = i, 0, number + 1
        num_bytes += image.num_bytes
    yield _Task(out=out, number=number, folders=folders, images=listing.images[start:])


def _pack_shard(task: _Task) -> int:
    """Write one tar, its DALI index and, last, the report that tells the shard is done. Runs in a worker process."""
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    quarantined: list[Quarantined] = []
    reencoded: Counter[str] = Counter()
    lines: list[str] = []
    digest = hashlib.sha256()
    with atomic_file(task.tar) as file:

        def add(name: str, data: bytes) -> int:
            """Append a member; returns where its data begins."""
            header = tar_header(name, len(data))
            start = file.tell() + len(header)
            for part in (header, data, bytes(-len(data) % BLOCK_BYTES)):
                digest.update(part)
                file.write(part)
            return start

        for image in task.images:
            try:
                packed = packed_image(_read(task.folders[image.source] / image.file_name))
            except BadImage as error:
                quarantined.append(Quarantined(source=image.source, file_name=image.file_name, reason=str(error)))
                continue
            about = {"file_name": image.file_name, "image_id": image.image_id, "width": packed.width, "height": packed.height}
            text = json.dumps(about).encode()
            jpeg_at, text_at = add(f"{image.key}.jpg", packed.jpeg), add(f"{image.key}.json", text)
            lines.append(f"jpg {jpeg_at} {len(packed.jpeg)} {image.key}.jpg json {text_at} {len(text)} {image.key}.json")
            rows.append((jpeg_at, len(packed.jpeg), image.image_id, 0, 0, packed.height, packed.width, image.source))
            names.append(f"{image.key}\0{image.file_name}")
            if packed.reencoded:
                reencoded[packed.reencoded] += 1
        ending = bytes(2 * BLOCK_BYTES + -(file.tell() + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE)
        digest.update(ending)
        file.write(ending)
        num_bytes = file.tell()
    if rows:
        with atomic_file(task.tar.with_suffix(".idx")) as file:
            file.write("".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines)).encode())  # as DALI's wds2idx writes it
    else:  # every image was bad: no reader takes an empty shard
        task.tar.unlink()
    report = {
        "number": task.number,
        "num_bytes": num_bytes,
        "sha256": digest.hexdigest(),
        "rows": rows,
        "names": names,
        "reencoded": dict(sorted(reencoded.items())),
        "quarantined": [asdict(entry) for entry in quarantined],
    }
    write_json(task.report, report)
    return len(task.images)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadImage("too large: files of at most 1 GB are read")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error


def tar_header(name: str, size: int) -> bytes:
    """A POSIX (ustar) header that depends on nothing but name and size."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o444
    return member.tobuf(tarfile.USTAR_FORMAT)


def _finish(listing: Listing, tasks: list[_Task], out: Path, *, inputs: str) -> Manifest:
    """Join the reports into the index and the manifest."""
    shards: list[tuple[int, int, bytes]] = []
    quarantined = list(listing.unreadable)
    reencoded: Counter[str] = Counter()
    tables: list[np.ndarray[Any, np.dtype[np.void]]] = []
    num_images = name_end = 0
    with atomic_file(out / NAMES_NAME) as file:
        for task in tasks:
            report = json.loads(task.report.read_bytes())
            quarantined += [Quarantined(**entry) for entry in report["quarantined"]]
            reencoded.update(report["reencoded"])
            if not report["rows"]:
                continue
            _renumber(task, report, len(shards))
            texts = [name.encode("utf-8", "surrogateescape") for name in report["names"]]
            table = np.array([tuple(row) for row in report["rows"]], ROW)
            table["name_end"] = name_end + np.cumsum([len(text) for text in texts])
            table["shard"] = len(shards)
            name_end = int(table["name_end"][-1])
            file.write(b"".join(texts))
            tables.append(table)
            shards.append((num_images, report["num_bytes"], report["sha256"].encode()))
            num_images += len(table)
        if not shards:
            for task in tasks:
                task.report.unlink()
            reasons = "; ".join(f"{entry.file_name}: {entry.reason}" for entry in quarantined[:3])
            raise DataError(f"none of the {len(listing.images)} images can be decoded ({reasons}); give a folder of images")
    table = np.concatenate(tables)
    write_array(out / INDEX_NAME, table)
    write_array(out / SHARDS_NAME, np.array(shards, SHARD))
    num_packed = np.bincount(table["source"], minlength=len(listing.sources)).tolist()
    manifest = Manifest(
        fingerprint=fingerprint_of(sha256 for _, _, sha256 in shards),
        num_images=num_images,
        num_shards=len(shards),
        num_bytes=sum(num_bytes for _, num_bytes, _ in shards),
        num_original=num_images - reencoded.total(),
        reencoded=dict(sorted(reencoded.items())),
        quarantined=tuple(quarantined),
        sources=tuple(
            SourceEntry(
                folder=str(source.folder.absolute()),
                annotations=None if source.annotations is None else str(source.annotations.absolute()),
                num_packed=num_packed[i],
                num_absent=len(listing.absent[i]),
                num_unlisted=listing.unlisted[i],
            )
            for i, source in enumerate(listing.sources)
        ),
        inputs=inputs,
    )
    manifest.write(out)
    return manifest


def _renumber(task: _Task, report: dict[str, Any], number: int) -> None:
    """Close the gaps that shards without a good image leave. A run killed in between can go on: reports are changed after their files."""
    if report["number"] != number:
        for suffix in (".tar", ".idx"):
            old = tar_path(task.out, report["number"]).with_suffix(suffix)
            if old.exists():
                old.replace(tar_path(task.out, number).with_suffix(suffix))
        report["number"] = number
        write_json(task.report, report)


def _finished(out: Path, *, inputs: str) -> Manifest | None:
    """The manifest of `out` if it was packed from the same inputs and nothing is lost."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.read(out)
    if manifest.inputs != inputs:
        raise StaleError(f"{out}: was packed from other images or with other settings; {_CHOICE}")
    sizes = {entry.name: entry.stat().st_size for entry in out.iterdir()}
    try:
        index = ShardIndex.open(out)
        lost = [path.name for path, n in zip(index.shard_paths, index.shards["num_bytes"], strict=True) if sizes.get(path.name) != n]
    except DataError as error:
        lost = [str(error)]
    if lost:
        log.warning("%s: %s is missing or cut short; packing again", out, lost[0])
    return None if lost else manifest


@contextmanager
def _work_folder(out: Path, *, inputs: str, overwrite: bool) -> Iterator[None]:
    """Hold `out` for this run alone, cleared of another packing. A run that fails before its first shard is done leaves nothing behind."""
    work = out / WORK_NAME
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another folder with --out")
    if out.is_dir() and not work.exists() and not (out / MANIFEST_NAME).exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty and holds no packed images; choose another folder with --out")
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another orl-fast shard is writing here; wait for it, or choose another folder with --out") from error
        try:
            plan = work / "inputs"
            planned = plan.read_text() if plan.exists() else None
            finished = (out / MANIFEST_NAME).exists()
            if planned not in (None, inputs) and not finished and not overwrite:
                raise StaleError(f"{out}: holds an unfinished packing of other images or settings; {_CHOICE}")
            if planned != inputs or finished:
                _clear(out)
                plan.write_text(inputs)
            yield
            shutil.rmtree(work)
        except BaseException:
            if not any(work.glob("*.json")):
                _clear(out)
                shutil.rmtree(work)
                with suppress(OSError):  # someone else may have put something there
                    for folder in created:
                        folder.rmdir()
            raise


def _clear(out: Path) -> None:
    """Remove another packing, its manifest first; what orl-fast shard did not write stays."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("images-??????.tar", "images-??????.idx", "*.partial", INDEX_NAME, NAMES_NAME, SHARDS_NAME, f"{WORK_NAME}/*.json"):
        for path in out.glob(pattern):
            path.unlink()
