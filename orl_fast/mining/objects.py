"""Ground-truth boxes in place of proposals (the paper's table of upper bounds), from COCO annotation files."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        DataError: a file is damaged, holds no boxes, or knows none of the images.
    """
    boxes: list[NDArray[np.int16]] = [np.empty((0, 4), np.int16)] * len(index)
    num_odd = 0
    for source, file in enumerate(files):
        if file is None:
            continue
        content, by_image = read_json(file), defaultdict(list)
        try:
            images = [(image["file_name"], image["id"], (image["width"], image["height"])) for image in content["images"]]
            for entry in content["annotations"]:
                if not entry.get("iscrowd", 0):
                    x, y, w, h = map(float, entry["bbox"])
                    by_image[entry["image_id"]].append((x, y, w, h))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: is no COCO annotation file with boxes ({error!r}); name another with --annotations FILE") from error
        rows = rows_of_names(index, [name for name, _, _ in images], source=source)
        if not (rows >= 0).any():
            raise DataError(f"{file}: lists none of the packed images; name another with --annotations FILE")
        for row, (_, image_id, size_px) in zip(rows.tolist(), images, strict=True):
            if row < 0 or image_id not in by_image:
                continue
            if size_px == (index.widths[row], index.heights[row]):
                boxes[row] = _pixels(np.array(by_image[image_id], np.float64).reshape(-1, 4), *size_px)
            else:
                num_odd += 1
    if num_odd:
        log.warning("objects: %d images have another size than annotated (rotated when packed?); each is taken as a whole", num_odd)
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


def _pixels(boxes_xywh: NDArray[np.float64], width: int, height: int) -> NDArray[np.int16]:
    """The whole pixels that boxes touch, within the image; boxes without area are left out."""
    outer = np.concatenate([np.floor(boxes_xywh[:, :2]), np.ceil(boxes_xywh[:, :2] + boxes_xywh[:, 2:])], axis=1)
    corners: NDArray[np.int16] = np.clip(outer, 0, np.minimum([width, height] * 2, 32767)).astype(np.int16)
    return np.asarray(corners[(corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])])
