"""The column of labels next to packed images: labels.npy and labels.json (shards/FORMAT.md)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError, StaleError
from orl_fast.files import write_array, write_json
from orl_fast.shards.index import ShardIndex

VERSION = 1
INFO_NAME, TABLE_NAME = "labels.json", "labels.npy"
TRAIN, VAL, NEITHER = 0, 1, -1
ROW = np.dtype([("label", "<i4"), ("split", "<i4")])
_REMEDY = "remove labels.json and labels.npy, or evaluate on the folder that the images were packed from"


@dataclass(frozen=True, kw_only=True)
class ImageClasses:
    """The class and the split of every image of a dataset."""

    classes: tuple[str, ...]  # names
    labels: NDArray[np.int32]  # [N] positions in `classes`; -1: no class
    splits: NDArray[np.int32]  # [N] TRAIN, VAL, or NEITHER: not used

    def fingerprint(self, index: ShardIndex) -> str:
        """32 hexadecimal digits that identify the packed images, their classes and splits."""
        about = json.dumps([index.fingerprint, self.classes]).encode()
        return hashlib.sha256(about + self._table().tobytes()).hexdigest()[:32]

    def _table(self) -> NDArray[Any]:
        table = np.empty(len(self.labels), ROW)
        table["label"], table["split"] = self.labels, self.splits
        return table


def write_classes(index: ShardIndex, classes: ImageClasses) -> None:
    """Write the column next to the images of `index`, unless it is there. DataError if the folder cannot be written."""
    fingerprint, info = classes.fingerprint(index), index.path / INFO_NAME
    if info.is_file() and (index.path / TABLE_NAME).is_file() and f'"{fingerprint}"' in info.read_text(errors="replace"):
        return
    info.unlink(missing_ok=True)
    write_array(index.path / TABLE_NAME, classes._table())
    about = {"version": VERSION, "index": index.fingerprint, "fingerprint": fingerprint, "classes": classes.classes}
    write_json(info, about)


def read_classes(index: ShardIndex) -> ImageClasses | None:
    """The column of a dataset; None where there is none. StaleError: it belongs to other images; DataError: it is damaged."""
    path = index.path / INFO_NAME
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_bytes())
        if about["version"] != VERSION:
            raise DataError(f"{path}: format version {about['version']}, this version reads {VERSION}; {_REMEDY}")
        if about["index"] != index.fingerprint:
            raise StaleError(f"{path}: made from images {about['index'][:8]}, this folder holds {index.fingerprint[:8]}; {_REMEDY}")
        table = np.load(index.path / TABLE_NAME, allow_pickle=False)
        classes, labels, splits = tuple(about["classes"]), table["label"], table["split"]
        found = ImageClasses(classes=classes, labels=labels, splits=splits)
        if table.dtype != ROW or table.shape != (len(index),) or found.fingerprint(index) != about["fingerprint"]:
            raise ValueError("labels.npy does not fit labels.json")
        if not _all_strings(classes) or labels.max() >= len(classes) or (labels[splits != NEITHER] < 0).any():
            raise ValueError("labels are out of range")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: damaged ({error}); {_REMEDY}") from error
    return found


def _all_strings(classes: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in classes)
