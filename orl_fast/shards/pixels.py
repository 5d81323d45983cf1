"""Pixel shards: the decoded images next to the JPEGs, to be mapped instead of decoded again in every epoch (shards/FORMAT.md)."""

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orl_fast.console import log, progress
from orl_fast.cores import num_cores
from orl_fast.errors import DataError, StaleError
from orl_fast.files import atomic_file, human_bytes, locked, remove_leftovers, require_free_space, write_array, write_json
from orl_fast.shards.index import ShardIndex
from orl_fast.shards.reader import MappedFiles, ShardReader
from orl_fast.shards.workers import run_in_workers
from orl_fast.shards.writer import BLOCK_BYTES, new_tar

VERSION = 1
INFO_NAME, TABLE_NAME, LINK_NAME, WORK_NAME = "pixels.json", "pixels.npy", "pixels.link", ".pixels"
# One row per image: where its pixels start in its tar, -1 if they are not stored, and their size.
ROW = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
_HEADER_BYTES = 128  # of a .npy file
_BATCH_IMAGES, _BATCH_BYTES = 32, 1 << 26  # decoded at once
_REMEDY = "run orl-fast pixels again"


class Decoded(NamedTuple):
    """An image that needs no decoding. Its pixels may be fewer than its height and width say; boxes refer to these."""

    pixels: NDArray[np.uint8]  # [h, w, 3] RGB
    height: int
    width: int

    def lines(self, top: int, bottom: int) -> NDArray[np.uint8]:
        """The pixels that lines `top` to `bottom` of the image cover; at least one line."""
        scale = len(self.pixels) / self.height
        first = min(max(floor(top * scale), 0), len(self.pixels) - 1)
        return self.pixels[first : max(ceil(bottom * scale), first + 1)]


@dataclass(frozen=True, kw_only=True)
class PixelInfo:
    """What a folder of pixel shards holds: the images of rows 0 … num_stored - 1."""

    version: int = VERSION
    index: str  # fingerprint of the dataset
    max_side: int | None  # longer images were made smaller
    num_images: int
    num_stored: int
    num_bytes: int
    shards: list[tuple[int, str]]  # of each tar: bytes, and SHA-256

    @classmethod
    def read(cls, folder: Path) -> "PixelInfo":
        """DataError: it is damaged or of another version."""
        path = folder / INFO_NAME
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            if values["version"] != VERSION:
                raise DataError(f"{path}: format version {values['version']}, this version reads {VERSION}; {_REMEDY} with --overwrite")
            values["shards"] = [(int(num_bytes), str(digest)) for num_bytes, digest in values["shards"]]
            found = cls(**values)
            if not 0 < found.num_stored <= found.num_images or found.num_bytes != sum(num_bytes for num_bytes, _ in found.shards):
                raise ValueError("its counts contradict each other")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error!r}); {_REMEDY} with --overwrite") from error
        return found


def pixel_path(folder: Path, shard: int) -> Path:
    """The tar with the pixels of images-NNNNNN.tar."""
    return folder / f"pixels-{shard:06d}.tar"


def write_pixels(
    index: ShardIndex,
    folder: Path | None = None,
    *,
    budget_bytes: int | None = None,
    max_side: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> PixelInfo:
    """Decode the images of a dataset once and store their pixels.

    An interrupted run is resumed and gives the same bytes; another budget adds or removes shards and leaves the others as they are.

    Args:
        folder: where; default: the dataset's own folder, which gets a link to any other.
        budget_bytes: store the first images, by row, that fit; default: all.
        max_side: shrink images of which a side is longer, in pixels. Their views then differ from those of the JPEGs.
        num_workers: processes; default one per core.
        overwrite: replace pixels of another dataset or of another `max_side`.
    Raises:
        DataError: the disk is full or too small, an image is damaged, or not one image fits the budget.
        StaleError: the folder holds other pixels and `overwrite` is not set. ValueError: a number is below 1.
    """
    if any(number is not None and number < 1 for number in (num_workers, max_side, budget_bytes)):
        raise ValueError(f"num_workers {num_workers}, max_side {max_side}, budget_bytes {budget_bytes}: each must be at least 1")
    folder = Path(folder or index.path)
    table = pixel_table(index, max_side=max_side, budget_bytes=budget_bytes)
    num_stored = int((table["offset"] >= 0).sum())
    if not num_stored:
        raise DataError(f"{folder}: a budget of {human_bytes(budget_bytes or 0)} holds not one image; give more, or --max-side")
    sizes = tar_sizes(index, table)
    head: dict[str, Any] = {"version": VERSION, "index": index.fingerprint, "max_side": max_side}
    share = f"{num_stored:,} of {len(index):,} images" if num_stored < len(index) else f"all {num_stored:,} images"
    log.info("%s: the pixels of %s take %s", folder, share, human_bytes(sum(sizes)))
    if not overwrite and (found := _finished(folder, head, sizes)):
        log.info("%s: up to date", folder)
        _link(index, folder)
        return found
    with locked(folder, what="orl-fast pixels"):
        finished = _resume(folder, head, sizes, overwrite=overwrite)
        waiting = [shard for shard in range(len(sizes)) if shard not in finished]
        there = [path.stat().st_size if (path := pixel_path(folder, shard)).exists() else 0 for shard in waiting]
        require_free_space(folder, num_bytes=sum(sizes[shard] for shard in waiting) - sum(there), purpose="storing the pixels")
        num_done = sum(len(stored_rows(index, table, shard)) for shard in finished)
        if num_done:
            log.info("%s: %d of %d images are there already", folder, num_done, num_stored)
        write = partial(_write_shard, folder, index, table)
        with progress("pixels", total=num_stored, unit="images", done=num_done) as advance:
            for shard, digest, count in run_in_workers(write, waiting, num_workers=min(num_workers or num_cores(), max(1, len(waiting)))):
                finished[shard] = digest
                advance(count)
        for path in set(folder.glob("pixels-??????.tar")) - {pixel_path(folder, shard) for shard in finished}:
            path.unlink()  # of a larger budget
        write_array(folder / TABLE_NAME, table)
        shards = [(sizes[shard], finished[shard]) for shard in range(len(sizes))]
        info = PixelInfo(**head, num_images=len(index), num_stored=num_stored, num_bytes=sum(sizes), shards=shards)
        write_json(folder / INFO_NAME, asdict(info))
        remove_leftovers(folder)  # of a killed run's workers, which may have outlived it for a moment
        shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    _link(index, folder)
    return info


def pixel_table(index: ShardIndex, *, max_side: int | None, budget_bytes: int | None) -> NDArray[np.void]:
    """[N] records of `ROW`: what is stored, and where. It follows from the sizes of the images alone."""
    table = np.zeros(len(index), ROW)
    sides = np.stack([index.heights, index.widths], axis=1).astype(np.int64)  # [N, 2]
    if max_side is not None:
        sides = np.maximum(1, np.rint(sides / np.maximum(1, sides.max(axis=1, keepdims=True) / max_side))).astype(np.int64)
    table["height"], table["width"], table["offset"] = sides[:, 0], sides[:, 1], -1
    for shard in range(index.num_shards):
        rows = index.shard_rows(shard)
        ends = np.cumsum(_member_bytes(table[rows.start : rows.stop]))
        totals = _whole_bytes(ends)
        fit = len(rows) if budget_bytes is None else int(np.searchsorted(totals, budget_bytes, "right"))
        table["offset"][rows.start : rows.start + fit] = np.concatenate([[0], ends])[:fit] + BLOCK_BYTES + _HEADER_BYTES
        if fit < len(rows):
            break
        budget_bytes = budget_bytes - int(totals[-1]) if budget_bytes is not None else None
    return table


def tar_sizes(index: ShardIndex, table: NDArray[np.void]) -> list[int]:
    """Bytes of each pixel shard."""
    stored = (stored_rows(index, table, shard) for shard in range(index.num_shards))
    return [int(_whole_bytes(_member_bytes(table[rows.start : rows.stop]).sum())) for rows in stored if rows]


def stored_rows(index: ShardIndex, table: NDArray[np.void], shard: int) -> range:
    """The rows of a shard of which the pixels are stored: its first ones."""
    rows = index.shard_rows(shard)
    return rows[: int((table["offset"][rows.start : rows.stop] >= 0).sum())]


def _member_bytes(table: NDArray[np.void]) -> NDArray[np.int64]:
    content = _HEADER_BYTES + 3 * table["height"].astype(np.int64) * table["width"]
    return BLOCK_BYTES + -(-content // BLOCK_BYTES) * BLOCK_BYTES  # type: ignore[no-any-return]


def _whole_bytes(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of a tar, by the bytes of its members: two empty blocks end it, then it is padded."""
    return -(-(members + 2 * BLOCK_BYTES) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _finished(folder: Path, head: dict[str, Any], sizes: list[int]) -> PixelInfo | None:
    """What the folder holds if it is just this."""
    if not (folder / INFO_NAME).exists():
        return None
    try:
        info = PixelInfo.read(folder)
    except DataError as error:
        log.warning("%s", error)
        return None
    same = _head(info) == head and [num_bytes for num_bytes, _ in info.shards] == sizes and (folder / TABLE_NAME).exists()
    return info if same and all(_has_size(pixel_path(folder, shard), size) for shard, size in enumerate(sizes)) else None


def _head(info: PixelInfo) -> dict[str, Any]:
    return {"version": info.version, "index": info.index, "max_side": info.max_side}


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _resume(folder: Path, head: dict[str, Any], sizes: list[int], *, overwrite: bool) -> dict[int, str]:
    """Prepare the folder, which is locked; returns the SHA-256 of each shard that is finished already.

    A complete folder becomes an unfinished one, so that nothing reads it while shards come and go. StaleError: it holds other pixels.
    """
    work, plan, there = folder / WORK_NAME, folder / WORK_NAME / "inputs", folder / INFO_NAME
    reports: dict[int, list[Any]] = {}
    planned = plan.read_text() if plan.exists() else None
    with suppress(DataError):  # damaged: everything is written again
        if there.exists():
            info = PixelInfo.read(folder)
            planned, reports = json.dumps(_head(info)), {shard: list(values) for shard, values in enumerate(info.shards)}
    if overwrite and there.exists():
        planned = None
    elif planned not in (None, json.dumps(head)):
        if not overwrite:
            raise StaleError(f"{folder}: holds pixels of other images or of another --max-side; add --overwrite to replace them")
        planned = None
    if planned is None:
        reports = {}
        for path in (there, *folder.glob("pixels-??????.tar"), *work.glob("??????.json")):
            path.unlink(missing_ok=True)
    for shard, values in reports.items():
        write_json(work / f"{shard:06d}.json", values)
    with atomic_file(plan) as file:
        file.write(json.dumps(head).encode())
    there.unlink(missing_ok=True)
    remove_leftovers(folder)
    remove_leftovers(work)
    finished = {}
    for shard, num_bytes in enumerate(sizes):
        with suppress(OSError, ValueError):
            size, digest = json.loads((work / f"{shard:06d}.json").read_bytes())
            if size == num_bytes and _has_size(pixel_path(folder, shard), num_bytes):
                finished[shard] = str(digest)
    return finished


def _write_shard(folder: Path, index: ShardIndex, table: NDArray[np.void], shard: int) -> tuple[int, str, int]:
    """Write one tar and, last, the report that marks it as done; returns its number, SHA-256 and images. Runs in a worker process."""
    from orl_fast.shards.decode import Decoder

    rows, path = stored_rows(index, table, shard), pixel_path(folder, shard)
    (folder / WORK_NAME / f"{shard:06d}.json").unlink(missing_ok=True)
    with ShardReader(index) as reader, closing(Decoder(1)) as decoder, new_tar(path) as add:
        for part in _batches(index, rows):
            whole = np.zeros((len(part), 4), np.int64)
            whole[:, 2], whole[:, 3] = index.widths[part.start : part.stop], index.heights[part.start : part.stop]
            for row, image, region in zip(part, decoder.decode(reader.views(part), whole.copy()), whole, strict=True):
                pixels = np.asarray(image) if image is not None else None
                if pixels is None or pixels.shape != (region[3], region[2], 3):
                    raise DataError(f"image {index.keys[row]}: its JPEG cannot be decoded any more; run orl-fast verify {index.path}")
                height, width = int(table["height"][row]), int(table["width"][row])
                if pixels.shape[:2] != (height, width):
                    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
                add(f"{index.keys[row]}.rgb.npy", _npy_header(height, width), np.ascontiguousarray(pixels).reshape(-1).data)
    with path.open("rb") as tar:
        digest = hashlib.file_digest(tar, "sha256").hexdigest()
    write_json(folder / WORK_NAME / f"{shard:06d}.json", [path.stat().st_size, digest])
    return shard, digest, len(rows)


def _batches(index: ShardIndex, rows: range) -> Iterator[range]:
    """Consecutive rows, few enough to be decoded at once."""
    start, num_bytes = rows.start, 0
    for row in rows:
        size = 3 * int(index.heights[row]) * int(index.widths[row])
        if row > start and (row - start == _BATCH_IMAGES or num_bytes + size > _BATCH_BYTES):
            yield range(start, row)
            start, num_bytes = row, 0
        num_bytes += size
    yield range(start, rows.stop)


def _npy_header(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (height, width, 3)})
    return buffer.getvalue()


def _link(index: ShardIndex, folder: Path) -> None:
    """Note in the dataset's folder where its pixels are, if they are elsewhere."""
    link = index.path / LINK_NAME
    if folder.resolve() == index.path.resolve():
        link.unlink(missing_ok=True)
        return
    try:
        write_json(link, {"folder": str(folder.absolute())})
    except DataError as error:
        log.warning("%s; name the pixels when you use them: loader.pixels_dir=%s", error, folder)


class PixelStore:
    """Reads stored pixels by row, without a copy. Safe to share between threads."""

    def __init__(self, index: ShardIndex, folder: Path, info: PixelInfo) -> None:
        self.folder, self.info, self._index = folder, info, index
        path = folder / TABLE_NAME
        try:
            self.table: NDArray[np.void] = np.asarray(np.load(path, mmap_mode="r"))
            if self.table.dtype != ROW or self.table.shape != (len(index),):
                raise ValueError(f"its shape is {self.table.shape}, expected ({len(index)},)")
        except Exception as error:  # NumPy's parser of headers raises anything at all on garbage
            raise DataError(f"{path}: missing or damaged ({error}); {_REMEDY}") from error
        paths, sizes = [pixel_path(folder, shard) for shard in range(len(info.shards))], [num_bytes for num_bytes, _ in info.shards]
        self._files = MappedFiles(paths, sizes, remedy=f"{_REMEDY} with --overwrite")

    @classmethod
    def find(cls, index: ShardIndex, folder: Path | None = None, *, level: int = logging.WARNING) -> "PixelStore | None":
        """The stored pixels of a dataset, in `folder` or where `write_pixels` put them last; None if there are none, or none that fit.

        Why there are none that fit is logged at `level`. DataError: `folder` is given and holds none, or what there is is damaged.
        """
        where = folder or linked_folder(index)
        if (where / INFO_NAME).exists():
            info = PixelInfo.read(where)
            if (info.index, info.num_images) == (index.fingerprint, len(index)):
                return cls(index, where, info)
            reason = "are of other images"
        elif (where / WORK_NAME).is_dir():
            reason = "are not finished"
        else:
            reason = "are not there"
        message = f"{where}: the pixels of {index.path} {reason}; run orl-fast pixels {index.path}"
        if folder is not None:
            raise DataError(f"{message} --pixels-dir {folder}")
        if reason != "are not there" or where != index.path:
            log.log(level, "%s; images are decoded from their JPEGs", message)
        return None

    def decoded(self, row: int) -> Decoded:
        """The image of a row below `info.num_stored`. DataError: its tar is missing or has another length."""
        offset, height, width = self.table[row].tolist()
        data = self._files.content(int(self._index.shard_ids[row]))
        size = height * width * 3
        if not 0 < offset <= len(data) - size:
            raise DataError(
                f"{self.folder / TABLE_NAME}: the pixels of row {row} lie beyond the end of their tar; {_REMEDY} with --overwrite"
            )
        pixels = data[offset : offset + size].reshape(height, width, 3)
        return Decoded(pixels, int(self._index.heights[row]), int(self._index.widths[row]))

    def read_from_disk(self, row: int) -> None:
        """Read an image's pixels and drop them, past the system's cache as far as it lets go of them: to time the disk."""
        offset, height, width = self.table[row].tolist()
        file = os.open(pixel_path(self.folder, int(self._index.shard_ids[row])), os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, offset, height * width * 3, os.POSIX_FADV_DONTNEED)
            os.pread(file, height * width * 3, offset)
        finally:
            os.close(file)

    def close(self) -> None:
        """Drop all maps; those that arrays still use are closed with the last of them."""
        self._files.close()


def linked_folder(index: ShardIndex) -> Path:
    """Where the pixels of a dataset are, or would be."""
    try:
        return Path(json.loads((index.path / LINK_NAME).read_bytes())["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return index.path


def pixel_faults(index: ShardIndex, *, fast: bool, num_workers: int) -> list[tuple[Path, str]]:
    """What is wrong with the stored pixels of a dataset, if there are any: sizes and the table, and unless `fast` every checksum."""
    folder = linked_folder(index)
    if not (folder / INFO_NAME).exists():
        return []
    try:
        store = PixelStore(index, folder, info := PixelInfo.read(folder))
    except DataError as error:
        return [(folder / INFO_NAME, str(error))]
    if (info.index, info.num_images) != (index.fingerprint, len(index)):
        return [(folder / INFO_NAME, f"its pixels are of other images; {_REMEDY} with --overwrite")]
    expected = pixel_table(index, max_side=info.max_side, budget_bytes=None)
    expected["offset"][info.num_stored :] = -1
    faults = []
    if not np.array_equal(store.table, expected):
        faults.append((folder / TABLE_NAME, f"does not follow from the images; {_REMEDY} with --overwrite"))
    if tar_sizes(index, expected) != [num_bytes for num_bytes, _ in info.shards]:
        faults.append((folder / INFO_NAME, f"its shards do not follow from the images; {_REMEDY} with --overwrite"))
    check = partial(_shard_fault, folder, fast)
    with progress("verify pixels", total=len(info.shards), unit="shards") as advance:
        for fault in run_in_workers(check, enumerate(info.shards), num_workers=1 if fast else min(num_workers, len(info.shards))):
            faults += [fault] if fault else []
            advance()
    return faults


def _shard_fault(folder: Path, fast: bool, shard: tuple[int, tuple[int, str]]) -> tuple[Path, str] | None:
    """Runs in a worker process."""
    number, (num_bytes, digest) = shard
    path = pixel_path(folder, number)
    try:
        if not _has_size(path, num_bytes):
            return path, f"is missing or has another length; {_REMEDY}"
        with path.open("rb") as file:
            if not fast and hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return path, f"its bytes have changed since it was written (SHA-256); {_REMEDY} with --overwrite"
    except OSError as error:
        return path, f"cannot be read ({error})"
    return None
