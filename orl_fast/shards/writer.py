"""Pack image folders into WebDataset shards. The unit of work, and of resuming, is the shard."""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orl_fast.console import log, progress
from orl_fast.cores import num_cores
from orl_fast.errors import DataError, StaleError
from orl_fast.files import LOCK_NAME, atomic_file, locked, remove_leftovers, require_free_space, write_array, write_json
from orl_fast.shards import index
from orl_fast.shards.images import JPEG_QUALITY, BadImage, packed_image
from orl_fast.shards.index import MANIFEST_NAME, WORK_NAME, Manifest, Quarantined, ShardIndex, SourceEntry, tar_path
from orl_fast.shards.sources import ListedImage, Listing, find_sources, list_images
from orl_fast.shards.workers import run_in_workers

BLOCK_BYTES = 512
MAX_SHARD_BYTES = 256_000_000
_MAX_FILE_BYTES = 1_000_000_000
_REMEDY = "add --overwrite to replace it, or choose another folder with --out"


def write_shards(
    sources: Path | Sequence[Path], out: Path, *,
    splits: Sequence[str] = (), shard_size: int = 256, num_workers: int | None = None, overwrite: bool = False,
) -> Manifest:  # fmt: skip
    """Pack the images of `sources`, in order, into the folder `out` (format: shards/FORMAT.md).

    An interrupted run is resumed and gives the same bytes. A complete dataset whose sources have not changed is left as it is.

    Args:
        sources: COCO roots, COCO split folders or any folders of images, or a single one.
        splits: which splits of a COCO root, instead of train2017.
        shard_size: images per shard; a shard also ends at 256 MB of source files. 256 divides COCO's train2017 into 463 of 42 MB.
        num_workers: processes that decode and write; default one per core. With several, a script needs `if __name__ == "__main__":`.
        overwrite: replace a dataset in `out` that was packed from other sources or with other settings.
    Raises:
        DataError: sources are missing or hold no usable images, `out` cannot be used, or the disk is full.
        StaleError: `out` holds another dataset and `overwrite` is not set. ValueError: shard_size or num_workers is below 1.
    """
    if shard_size < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(f"shard_size ({shard_size}) and num_workers ({num_workers}) must be at least 1")
    out = Path(out)
    found = find_sources([Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)], splits=splits)
    for source in found:
        if out.resolve().is_relative_to(source.folder.resolve()):
            raise DataError(f"{out}: lies within the source {source.folder}; choose another folder with --out")
    listing = list_images(found)
    _log_listing(listing)
    inputs = hashlib.sha256(f"{index.VERSION} {shard_size} {MAX_SHARD_BYTES} {JPEG_QUALITY} {listing.digest()}".encode()).hexdigest()
    cuts = list(enumerate(_cuts(listing.images, shard_size=shard_size)))
    with _work_folder(out, inputs=inputs, overwrite=overwrite) as finished:
        if finished:
            return finished
        waiting = [(number, images) for number, images in cuts if not _report_path(out, number).exists()]
        sizes = [image.num_bytes + 4 * BLOCK_BYTES for _, images in waiting for image in images]
        require_free_space(out, num_bytes=sum(sizes), purpose="packing")
        if num_done := len(listing.images) - len(sizes):
            log.info("%s: resuming after %d of %d images", out, num_done, len(listing.images))
        pack = partial(_pack_shard, out, [source.folder for source in found])
        with progress("pack", total=len(listing.images), unit="images", done=num_done) as advance:
            for count in run_in_workers(pack, waiting, num_workers=min(num_workers or num_cores(), len(waiting))):
                advance(count)
        return _finish(listing, [_report_path(out, number) for number, _ in cuts], out, inputs=inputs)


def _log_listing(listing: Listing) -> None:
    """Log what will be packed, and warn of what is unusual about the sources."""
    for source, absent, unlisted in zip(listing.sources, listing.absent, listing.unlisted, strict=True):
        order = f"order and ids from {source.annotations}" if source.annotations else "no annotation file, in order of paths"
        log.info("%s: %s", source.folder, order)
        if absent:
            log.warning("%s: %d images are not on disk, the first is %s", source.annotations, len(absent), absent[0])
        if unlisted:
            log.warning("%s: %d images are not in %s; they come last", source.folder, unlisted, source.annotations)


def _cuts(images: list[ListedImage], *, shard_size: int) -> Iterator[list[ListedImage]]:
    """Divide the listing by what is known before decoding, so that the result does not depend on the order of work."""
    start, num_bytes = 0, 0
    for i, image in enumerate(images):
        if i > start and (i - start == shard_size or num_bytes + image.num_bytes > MAX_SHARD_BYTES):
            yield images[start:i]
            start, num_bytes = i, 0
        num_bytes += image.num_bytes
    yield images[start:]


def _report_path(out: Path, number: int) -> Path:
    return out / WORK_NAME / f"{number:06d}.json"


def _pack_shard(out: Path, folders: Sequence[Path], shard: tuple[int, list[ListedImage]]) -> int:
    """Write one tar, its DALI index and, last, the report that marks the shard as done. Runs in a worker process."""
    number, images = shard
    path = tar_path(out, number)
    report: dict[str, Any] = {"number": number, "rows": [], "names": [], "reencoded": Counter(), "quarantined": []}
    lines: list[str] = []
    with new_tar(path) as add:
        for image in images:
            file = folders[image.source] / image.file_name
            try:
                if file.stat().st_size > _MAX_FILE_BYTES:
                    raise BadImage("too large: files of at most 1 GB are read")
                packed = packed_image(file.read_bytes())
            except (BadImage, OSError) as error:
                reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
                report["quarantined"].append({"source": image.source, "file_name": image.file_name, "reason": reason})
                continue
            values = {"file_name": image.file_name, "image_id": image.image_id, "width": packed.width, "height": packed.height}
            text = json.dumps(values).encode()
            jpeg_at, text_at = add(f"{image.key}.jpg", packed.jpeg), add(f"{image.key}.json", text)
            lines.append(f"jpg {jpeg_at} {len(packed.jpeg)} {image.key}.jpg json {text_at} {len(text)} {image.key}.json\n")
            report["rows"].append((jpeg_at, len(packed.jpeg), image.image_id, 0, 0, packed.height, packed.width, image.source))
            report["names"].append(f"{image.key}\0{image.file_name}")
            if packed.reencoded:
                report["reencoded"][packed.reencoded] += 1
    if lines:
        with atomic_file(path.with_suffix(".idx")) as idx:
            idx.write("".join([f"v1.2 {len(lines)}\n", *lines]).encode())  # as DALI's wds2idx writes it
        with path.open("rb") as tar:
            report |= {"num_bytes": path.stat().st_size, "sha256": hashlib.file_digest(tar, "sha256").hexdigest()}
    else:  # every image was bad: readers accept no empty shard
        path.unlink()
    write_json(_report_path(out, number), report)
    return len(images)


@contextmanager
def new_tar(path: Path) -> Iterator[Callable[..., int]]:
    """Write a tar file atomically; yields `add(name, *data)`, which returns the position of the member's data, given in parts."""
    with atomic_file(path) as file:

        def add(name: str, *data: bytes | memoryview) -> int:
            member = tarfile.TarInfo(name)
            member.size, member.mode = sum(map(len, data)), 0o444
            file.write(member.tobuf(tarfile.USTAR_FORMAT))  # POSIX; depends only on name and size
            start = file.tell()
            file.writelines([*data, bytes(-member.size % BLOCK_BYTES)])
            return start

        yield add
        file.write(bytes(2 * BLOCK_BYTES + -(file.tell() + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE))


def _finish(listing: Listing, reports: Sequence[Path], out: Path, *, inputs: str) -> Manifest:
    """Join the reports into the index and the manifest."""
    parts: list[np.ndarray[Any, np.dtype[np.void]]] = []
    records: list[tuple[int, int, bytes]] = []
    quarantined = list(listing.unreadable)
    reencoded: Counter[str] = Counter()
    with atomic_file(out / index.NAMES_NAME) as file:
        for path in reports:
            report = json.loads(path.read_bytes())
            quarantined += [Quarantined(**entry) for entry in report["quarantined"]]
            if not report["rows"]:
                continue
            reencoded.update(report["reencoded"])
            _renumber(path, report, len(parts), out)
            texts = [name.encode("utf-8", "surrogateescape") for name in report["names"]]
            file.write(b"".join(texts))
            part = np.array([tuple(row) for row in report["rows"]], index.ROW)
            part["shard"], part["name_end"] = len(parts), [len(text) for text in texts]
            parts.append(part)
            records.append((0, report["num_bytes"], report["sha256"].encode()))
        if not parts:
            for path in reports:
                path.unlink()
            reasons = "; ".join(f"{entry.file_name}: {entry.reason}" for entry in quarantined[:3])
            raise DataError(f"none of the {len(listing.images)} images can be decoded ({reasons}); give a folder of images")
    table, shards = np.concatenate(parts), np.array(records, index.SHARD)
    np.cumsum(table["name_end"], out=table["name_end"])
    shards["first_row"] = np.searchsorted(table["shard"], range(len(shards)))
    write_array(out / index.INDEX_NAME, table)
    write_array(out / index.SHARDS_NAME, shards)
    num_packed = np.bincount(table["source"], minlength=len(listing.sources)).tolist()
    entries = (
        SourceEntry(
            folder=str(source.folder.absolute()), annotations=str(source.annotations.absolute()) if source.annotations else None,
            num_packed=num_packed[i], num_absent=len(listing.absent[i]), num_unlisted=listing.unlisted[i],
        )
        for i, source in enumerate(listing.sources)
    )  # fmt: skip
    finished = Manifest(
        fingerprint=index.fingerprint_of(shards["sha256"].tolist()), inputs=inputs, sources=tuple(entries), quarantined=tuple(quarantined),
        num_images=len(table), num_shards=len(shards), num_bytes=int(shards["num_bytes"].sum()),
        num_original=len(table) - reencoded.total(), reencoded=dict(sorted(reencoded.items())),
    )  # fmt: skip
    finished.write(out)
    return finished


def _renumber(path: Path, report: dict[str, Any], number: int, out: Path) -> None:
    """Close the gap left by shards without a good image. A run killed in between can be resumed: a report is changed after its files."""
    if report["number"] != number:
        for old in out.glob(f"{tar_path(out, report['number']).stem}.???"):
            old.replace(tar_path(out, number).with_suffix(old.suffix))
        write_json(path, report | {"number": number})


def _finished(out: Path, *, inputs: str, warn: bool = False) -> Manifest | None:
    """The manifest of `out` if it was packed from the same inputs and no file is missing."""
    if not (out / MANIFEST_NAME).exists():
        return None
    if Manifest.read(out).inputs != inputs:
        raise StaleError(f"{out}: packed from other images or with other settings; {_REMEDY}")
    try:
        found = ShardIndex.open(out)
        for path, num_bytes in zip(found.shard_paths, found.shards["num_bytes"], strict=True):
            if not path.is_file() or path.stat().st_size != num_bytes:
                raise DataError(f"{path}: missing or truncated")
    except DataError as error:
        if warn:
            log.warning("%s; packing again", error)
        return None
    log.info("%s: up to date, %d images in %d shards", out, len(found), found.num_shards)
    return found.manifest


@contextmanager
def _work_folder(out: Path, *, inputs: str, overwrite: bool) -> Iterator[Manifest | None]:
    """Lock `out` and clear it of another dataset; yields the manifest if there turns out to be nothing to do.

    A run that fails before its first shard is done leaves nothing behind, and in a folder that was not empty only the lock file.
    """
    work = out / WORK_NAME
    if not overwrite and not work.exists() and (finished := _finished(out, inputs=inputs)):
        yield finished  # needs no lock, so it may belong to another user
        return
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file, not a folder; choose another folder with --out")
    entries = set(os.listdir(out)) if out.is_dir() else set()
    if entries - {LOCK_NAME} and not entries & {WORK_NAME, MANIFEST_NAME}:
        raise DataError(f"{out}: is not empty and not a dataset; choose another folder with --out")
    with locked(out, what="orl-fast shard"):
        # Look again: another process may have finished in the meantime, or been killed before it could remove its work folder.
        finished = None if overwrite else _finished(out, inputs=inputs, warn=True)
        plan = work / "inputs"
        planned = plan.read_text() if plan.exists() else None
        complete = (out / MANIFEST_NAME).exists()
        if planned not in (None, inputs) and not complete and not overwrite and any(work.glob("*.json")):
            raise StaleError(f"{out}: holds an unfinished dataset of other images or settings; {_REMEDY}")
        try:
            if not finished:
                if planned != inputs or complete:
                    _clear(out)
                with atomic_file(plan) as file:
                    file.write(inputs.encode())
                remove_leftovers(out)
                remove_leftovers(work)
            yield finished
        except BaseException:
            if not any(work.glob("*.json")):
                _clear(out)
                shutil.rmtree(work, ignore_errors=True)
            raise
        remove_leftovers(out)  # of a killed run's workers, which may have outlived it for a moment
        shutil.rmtree(work, ignore_errors=True)


def _clear(out: Path) -> None:
    """Remove another dataset, its manifest first; files that orl-fast shard did not write stay."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("images-??????.tar", "images-??????.idx", index.INDEX_NAME, index.NAMES_NAME, index.SHARDS_NAME, f"{WORK_NAME}/*.json"):
        for path in out.glob(pattern):
            path.unlink()
