"""Annotated objects of packed images, from COCO-style files: in place of proposals (the paper's upper bound), and to score mined RoIs."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from orl_fast.coco import Annotations, read_annotations, rotate_boxes
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable

NOT_PACKED, OTHER_FRAME = -1, -2


def annotation_files(index: ShardIndex, given: Path | None = None) -> list[Path | None]:
    """The annotation file of each packed source: the given one for all, or what the manifest recorded.

    DataError if a file does not exist, or no source has one.
    """
    files = [given or (Path(source.annotations) if source.annotations else None) for source in index.manifest.sources]
    if not any(files):
        raise DataError(f"{index.path}: packed without an annotation file; name one with --annotations FILE")
    for file in files:
        if file is not None and not file.is_file():
            raise DataError(f"{file}: there is no such annotation file; name it with --annotations FILE")
    return files


def digest_files(files: Sequence[Path | None]) -> str:
    """Names the content of annotation files."""
    digests = (hashlib.sha256(file.read_bytes() if file else b"").digest() for file in files)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """The content of an annotation file, and where its images are in the index."""

    file: Path
    content: Annotations
    rows: NDArray[np.int64]  # [N] of the file's images; NOT_PACKED, or OTHER_FRAME where an image has another size than annotated
    boxes: list[NDArray[np.float64]]  # of each image [m, 4] xyxy, pixels of the packed image


def annotated_objects(index: ShardIndex, files: Sequence[Path | None]) -> Iterator[Annotated]:
    """Read the `files` (see `annotation_files`). Crowds are left out; boxes are rotated with an image whose EXIF orientation was applied.

    DataError if a file is damaged, none of its boxes can be used, or it lists none of the images.
    """
    rotated = has_rotated(index)
    for source, file in enumerate(files):
        if file is None:
            continue
        found = read_annotations(file)
        rows = rows_of_names(index, found.file_names, source=source)
        if not (rows >= 0).any():
            raise DataError(f"{file}: lists none of the packed images; name another with --annotations FILE")
        boxes = [found.boxes_of(image) for image in range(len(rows))]
        folder, num_rotated = Path(index.manifest.sources[source].folder), 0
        for image, (row, annotated) in enumerate(zip(rows.tolist(), found.sizes_px.tolist(), strict=True)):
            if row < 0 or not len(boxes[image]):
                continue
            width, height = int(index.widths[row]), int(index.heights[row])
            orientation = _orientation(folder / index.file_names[row]) if rotated else 1
            stored = (height, width) if orientation >= 5 else (width, height)
            if orientation > 1 and tuple(annotated) in (stored, (0, 0)):  # else they are annotated upright
                boxes[image] = rotate_boxes(boxes[image], orientation=orientation, size_px=stored)
                num_rotated += 1
            elif tuple(annotated) not in ((width, height), (0, 0)):  # 0: the file has no sizes
                rows[image] = OTHER_FRAME
        if num_rotated:
            log.warning("%s: %d images are stored rotated (EXIF): their boxes are rotated with them", file, num_rotated)
        yield Annotated(file=file, content=found, rows=rows, boxes=boxes)


def object_boxes(index: ShardIndex, files: Sequence[Path | None]) -> BoxTable:
    """The objects of each image, see `annotated_objects`, in the file's order, or none."""
    table: list[NDArray[np.int16]] = [np.empty((0, 4), np.int16)] * len(index)
    num_resized = 0
    for found in annotated_objects(index, files):
        num_resized += int((found.rows == OTHER_FRAME).sum())
        for row, objects in zip(found.rows.tolist(), found.boxes, strict=True):
            if row >= 0 and len(objects):
                table[row] = _pixels(objects, int(index.widths[row]), int(index.heights[row]))
    if num_resized:
        log.warning("objects: %d images have another size than annotated; each is taken as a whole", num_resized)
    return BoxTable.from_lists(table)


def rows_of_names(index: ShardIndex, file_names: Sequence[str], *, source: int | None = None) -> NDArray[np.int64]:
    """The row of each named image, of those of one packed `source` if it is given; -1 if it is not packed.

    An image is found by its file name or, where that is unknown, by the last part of it.
    """
    rows = np.arange(len(index)) if source is None else np.flatnonzero(index.sources == source)
    whole: dict[str, int] = {}
    tails: dict[str, int] = {}
    for row in rows.tolist():
        name = index.file_names[row]
        tail = name.rpartition("/")[2]
        whole[name] = row if name not in whole else -1  # ambiguous names match nothing
        tails[tail] = row if tail not in tails else -1
    return np.array([whole.get(name, tails.get(name.rpartition("/")[2], -1)) for name in file_names], np.int64)


def _pixels(boxes: NDArray[np.float64], width: int, height: int) -> NDArray[np.int16]:
    """The whole pixels that boxes [m, 4] xyxy touch, within the image; boxes without area are left out."""
    outer = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
    corners: NDArray[np.int16] = np.clip(outer, 0, np.minimum([width, height] * 2, 32767)).astype(np.int16)
    return np.asarray(corners[(corners[:, 2:] > corners[:, :2]).all(axis=1)])


def has_rotated(index: ShardIndex) -> bool:
    """Whether the EXIF orientation of some image was applied when it was packed."""
    return any("EXIF rotation" in reason for reason in index.manifest.reencoded)


def _orientation(path: Path) -> int:
    """That of EXIF, 2 to 8, or 1: the file is upright, or not there any more."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            found: Any = image.getexif().get(ExifTags.Base.Orientation)
            return int(found) if found in range(2, 9) else 1
    except Exception:  # decoders raise anything at all on garbage
        return 1
