"""Proposals of any images, without packing them: one COCO-like JSON file."""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from orl_fast import __version__
from orl_fast.boxes import filter_proposals
from orl_fast.console import progress
from orl_fast.errors import DataError
from orl_fast.files import atomic_file
from orl_fast.selective_search import Backend, one_opencv_thread, selective_search
from orl_fast.shards.images import BadImage, decode_rgb, packed_image
from orl_fast.shards.sources import find_sources, list_images
from orl_fast.shards.workers import run_in_workers

_Found = tuple[int, int, NDArray[np.int16]] | str  # width and height of the upright image, boxes [P, 4] xywh; or why it is skipped
_OFF = {"min_side_px": 0, "max_aspect": math.inf, "max_iou": 1.0, "max_rois": 2**31 - 1}


@dataclass(frozen=True, kw_only=True)
class ProposalFile:
    """What was written."""

    num_images: int
    num_boxes: int
    num_absent: int  # images of the annotation file
    skipped: dict[str, str]  # file name → reason


def image_seed(file_name: str, seed: int) -> int:
    """The seed that a photograph's boxes are ordered with: no other photograph, and no number of workers, changes it."""
    return zlib.crc32(file_name.encode(errors="surrogateescape"), seed)


def write_proposals(
    photos: Path,
    out: Path | BinaryIO,
    *,
    split: str | None = None,
    seed: int = 0,
    backend: Backend = "fast",
    limits: Mapping[str, Any] | None = None,
    num_workers: int = 1,
) -> ProposalFile:
    """Search an image file, or every image of a folder as `list_images` lists it, in worker processes.

    Images are decoded as `packed_image` packs them: upright, and what is no plain JPEG as the JPEG it would be packed as. An image that
    cannot be decoded is skipped. Annotations are written as they are found, by image and then by rank; the list of images follows them.

    Args:
        out: a path, which appears only when all is written, or an open file. split: of a COCO folder with several.
        limits: arguments of `filter_proposals`; those left out, or all, limit nothing.
    Raises:
        DataError: there is no image, or none that can be decoded; the file cannot be written.
    """
    folder, images, skipped, num_absent = _list(photos, split)
    info = {
        "description": "Selective search: bbox is xywh in pixels of the upright image; the boxes of an image are in order of rank",
        "version": f"orl-fast {__version__}, OpenCV {cv2.__version__}",
        "backend": backend,
        "seed": seed,
        "filter": dict(sorted(limits.items())) if limits else None,
    }
    search = partial(_search, folder=folder, seed=seed, backend=backend, limits=limits)
    found = run_in_workers(search, enumerate(file_name for _, file_name in images), num_workers=num_workers)
    entries, num_boxes = [], 0
    opened = atomic_file(out) if isinstance(out, Path) else nullcontext(out)
    with opened as file, progress("proposals", total=len(images), unit="images") as advance:
        file.write(f'{{"info": {json.dumps(info)},\n"annotations": ['.encode())
        for (image_id, file_name), result in zip(images, _in_order(found), strict=True):
            if isinstance(result, str):
                skipped[file_name] = result
            else:
                width, height, boxes = result
                file.write(_annotations(boxes, image_id, after=num_boxes).encode())
                entries.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
                num_boxes += len(boxes)
            advance()
        if not entries:
            name, reason = next(iter(skipped.items()))
            raise DataError(f"{photos}: no image can be decoded, the first is {name!r}: {reason}; nothing was written")
        rest = {"images": entries, "categories": [{"id": 1, "name": "object"}], "skipped": skipped}
        file.write(f"\n],\n{json.dumps(rest)[1:]}\n".encode())
    return ProposalFile(num_images=len(entries), num_boxes=num_boxes, num_absent=num_absent, skipped=skipped)


def _list(photos: Path, split: str | None) -> tuple[Path, list[tuple[int, str]], dict[str, str], int]:
    """The folder, its images (id and name), what in it is unreadable, and how many images of its annotation file are not there."""
    if not photos.exists():
        raise DataError(f"{photos}: no such file or folder; give an image or a folder of images")
    if photos.is_file() and not split:
        return photos.parent, [(0, photos.name)], {}, 0
    listing = list_images(find_sources([photos], splits=[split] if split else []))
    images = [(image.image_id, image.file_name) for image in listing.images]
    return listing.sources[0].folder, images, {entry.file_name: entry.reason for entry in listing.unreadable}, len(listing.absent[0])


def _search(task: tuple[int, str], *, folder: Path, seed: int, backend: Backend, limits: Mapping[str, Any] | None) -> tuple[int, _Found]:
    """The proposals of one photograph, with its position. Runs in a worker process."""
    position, file_name = task
    try:
        packed = packed_image((folder / file_name).read_bytes())
        with one_opencv_thread():  # images are the parallel unit
            boxes = selective_search(np.asarray(decode_rgb(packed.jpeg)), seed=image_seed(file_name, seed), backend=backend)
    except (BadImage, DataError, MemoryError, OSError) as error:
        return position, getattr(error, "strerror", None) or str(error) or "too large for the memory at hand"
    if limits:
        boxes = boxes[filter_proposals(boxes, **{**_OFF, **limits})]
    boxes[:, 2:] -= boxes[:, :2]
    return position, (packed.width, packed.height, boxes)


def _in_order(found: Iterable[tuple[int, _Found]]) -> Iterator[_Found]:
    waiting: dict[int, _Found] = {}
    position = 0
    for number, result in found:
        waiting[number] = result
        while position in waiting:
            yield waiting.pop(position)
            position += 1


def _annotations(boxes: NDArray[np.int16], image_id: int, *, after: int) -> str:
    """One line for each box; ids count from 1, as COCO's evaluation takes 0 for none."""
    lines = (
        f'\n{{"id": {i}, "image_id": {image_id}, "category_id": 1, "bbox": [{x}, {y}, {w}, {h}], "area": {w * h}, "iscrowd": 0}}'
        for i, (x, y, w, h) in enumerate(boxes.tolist(), after + 1)
    )
    return ("," if after else "") + ",".join(lines)
