"""Ground-truth boxes in place of proposals (the paper's table of upper bounds), from COCO annotation files."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.coco import read_annotations
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable


def annotation_files(index: ShardIndex, given: Path | None = None) -> list[Path | None]:
    """The annotation file of each packed source: the given one for all, or what the manifest recorded.

    Raises:
        DataError: a file does not exist, or no source has one.
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


def object_boxes(index: ShardIndex, files: Sequence[Path | None]) -> BoxTable:
    """The annotated objects of each image, in the file's order; none where an image has none. Crowds are left out.

    Args:
        files: per source, see `annotation_files`. Images are found by their file names.
    Raises:
        DataError: a file is damaged, none of its boxes can be used, or it lists none of the images.
    """
    boxes: list[NDArray[np.int16]] = [np.empty((0, 4), np.int16)] * len(index)
    num_resized = 0
    for source, file in enumerate(files):
        if file is None:
            continue
        found = read_annotations(file)
        rows = rows_of_names(index, found.file_names, source=source)
        if not (rows >= 0).any():
            raise DataError(f"{file}: lists none of the packed images; name another with --annotations FILE")
        for image, (row, annotated) in enumerate(zip(rows.tolist(), found.sizes_px.tolist(), strict=True)):
            objects = found.boxes_of(image)
            if row < 0 or not len(objects):
                continue
            size_px = [int(index.widths[row]), int(index.heights[row])]
            if annotated in (size_px, [0, 0]):  # 0: the file has no sizes
                boxes[row] = _pixels(objects, *size_px)
            else:
                num_resized += 1
    if num_resized:
        log.warning("objects: %d images have another size than annotated (rotated when packed?); each is taken as a whole", num_resized)
    return BoxTable.from_lists(boxes)


def rows_of_names(index: ShardIndex, file_names: Sequence[str], *, source: int | None = None) -> NDArray[np.int64]:
    """The row of each named image, by its file name or, where that is unknown, by the last part of it; -1 if it is not packed.

    Args:
        source: look among the images of one packed source only.
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


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); give another file") from error


def _pixels(boxes: NDArray[np.float64], width: int, height: int) -> NDArray[np.int16]:
    """The whole pixels that boxes [m, 4] xyxy touch, within the image; boxes without area are left out."""
    outer = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
    corners: NDArray[np.int16] = np.clip(outer, 0, np.minimum([width, height] * 2, 32767)).astype(np.int16)
    return np.asarray(corners[(corners[:, 2:] > corners[:, :2]).all(axis=1)])
