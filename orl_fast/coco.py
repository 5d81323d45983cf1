"""COCO-style annotation files. An entry that cannot be used is skipped, counted and named; it never costs the file."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log
from orl_fast.errors import DataError

Id = int | str
_IMAGES_ARRAY = re.compile(r'"images"\s*:\s*(?=\[)')
_NAMED = 3  # skipped entries that a message names
_REMEDY = "fix it, move it away, or give another annotation file"
_SHARES = "boxes within 0 … 1, which look like shares of the image's sides"
Skipped = defaultdict[str, list[str]]  # what is skipped → the names of the entries
_Named = tuple[str, Id, dict[str, Any]]  # name, id, entry


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The images of an annotation file and their objects, image by image; crowds only where it was read `complete`."""

    file_names: tuple[str, ...]  # the images by ascending id, each once
    sizes_px: NDArray[np.int64]  # [N, 2] width and height of each image; 0 where the file has none
    images: NDArray[np.int64]  # [M] position of each object's image in `file_names`, ascending; objects of one image keep the file's order
    boxes: NDArray[np.float64]  # [M, 4] xyxy, pixels
    labels: NDArray[np.int64]  # [M] position of each object's category in `categories`; -1 if it has none that the file lists
    categories: tuple[str, ...]  # the names, each once, by ascending id
    num_skipped: int  # objects that cannot be used
    image_ids: tuple[Id, ...]  # of each image; of one that is listed again, the first
    category_ids: tuple[Id, ...]  # likewise
    entries: tuple[dict[str, Any], ...] = ()  # [M] each object as the file has it, where the file was read `complete`

    def boxes_of(self, image: int) -> NDArray[np.float64]:
        """[m, 4]: the boxes of one image."""
        first, last = np.searchsorted(self.images, [image, image + 1])
        return self.boxes[first:last]


def read_image_ids(path: Path) -> dict[str, int]:
    """File name → id of each image, in the file's order. Positions replace ids that are not all integers.

    DataError if the file is not a COCO-style annotation file.
    """
    skipped = Skipped(list)
    images = _images(path, _only_images(path) or _entries(path, read_json(path), "images"), skipped)
    numbers = all(isinstance(key, int) for _, key, _ in images)
    if not numbers:
        log.warning("%s: its image ids are not integers; images are numbered by their position", path)
    ids: dict[str, int] = {}
    for position, (name, key, _) in enumerate(images):
        ids.setdefault(name, int(key) if numbers else position)
    warn_skipped(path, skipped)
    return ids


def read_annotations(path: Path, content: Any = None, *, complete: bool = False) -> Annotations:
    """Read images, objects and categories. Ids written as text are joined with equal integers; what is listed twice by name is merged.

    `complete`: crowds too, and the objects' own entries, which hold whatever else the file says about them (masks, areas, "iscrowd").
    `content`: of the file, if it has been read.
    DataError if the file is not a COCO-style annotation file, or none of its objects can be used, for example because their boxes are
    shares of the image's sides.
    """
    content, skipped = read_json(path) if content is None else content, Skipped(list)
    images = _by_id(_images(path, _entries(path, content, "images"), skipped))
    sizes: dict[str, tuple[int, int]] = {}
    for name, _, entry in images:
        sizes[name] = max(sizes.get(name, (0, 0)), _size_px(entry))
    numbers = {name: number for number, name in enumerate(sizes)}
    image_of = _unambiguous((key, numbers[name]) for name, key, _ in images)
    listed = content.get("categories")
    named = _by_id(list(_named(listed if isinstance(listed, list) else [], "categories", lambda entry: entry.get("name"), skipped)))
    categories = list(dict.fromkeys(name for name, _, _ in named))
    label_of = _unambiguous((key, categories.index(name)) for name, key, _ in named)
    objects: list[tuple[int, int, list[float], dict[str, Any]]] = []  # image, label, box, entry
    unusable, num_crowds = Skipped(list), 0
    entries = _entries(path, content, "annotations")
    for position, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        image, label, box = image_of.get(_id(entry, "image_id")), label_of.get(_id(entry, "category_id")), _box(entry)
        num_crowds += is_crowd(entry)
        if is_crowd(entry) and not complete:
            continue
        if image is None:
            unusable["objects of an image that is not listed, or shares its id with another"].append(_name(entry, position))
        elif box is None:
            unusable["objects without a box [x, y, width, height] that has an area"].append(_name(entry, position))
        elif max(map(abs, box)) <= 1:
            unusable[_SHARES].append(_name(entry, position))
        else:
            objects.append((image, -1 if label is None else label, box, entry))
    if unusable and not objects:
        reasons = "; ".join(f"{len(names)} {what}" for what, names in unusable.items())
        remedy = "multiply x and width by the image's width, y and height by its height" if _SHARES in unusable else "give another file"
        raise DataError(f"{path}: none of its {len(entries) - (0 if complete else num_crowds)} objects can be used ({reasons}); {remedy}")
    warn_skipped(path, skipped | unusable)
    objects.sort(key=itemgetter(0))
    boxes = np.array([box for _, _, box, _ in objects], np.float64).reshape(-1, 4)
    ids: dict[str, Id] = {}
    for name, key, _ in images:
        ids.setdefault(name, key)
    category_ids: dict[str, Id] = {}
    for name, key, _ in named:
        category_ids.setdefault(name, key)
    return Annotations(
        file_names=tuple(sizes),
        sizes_px=np.array(list(sizes.values()), np.int64).reshape(-1, 2),
        images=np.array([image for image, _, _, _ in objects], np.int64),
        boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        labels=np.array([label for _, label, _, _ in objects], np.int64),
        categories=tuple(categories),
        num_skipped=sum(map(len, unusable.values())),
        image_ids=tuple(ids.values()),
        category_ids=tuple(category_ids.values()),
        entries=tuple(entry for _, _, _, entry in objects) if complete else (),
    )


@dataclass(frozen=True, kw_only=True)
class ImageLabels:
    """What a file says that labels whole images, as iNaturalist's do."""

    labels: dict[str, str]  # file name → class, images by ascending id
    classes: tuple[str, ...]  # by ascending id, with those that no image has
    num_skipped: int  # annotations that cannot be used


def labels_whole_images(content: Any) -> bool:
    """Whether the content of an annotation file gives categories to images, without boxes."""
    entries = content.get("annotations") if isinstance(content, dict) else None
    labelled = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return any("category_id" in entry for entry in labelled) and not any("bbox" in entry for entry in labelled)


def read_image_labels(path: Path, content: Any = None) -> ImageLabels:
    """Read a file that labels whole images: one category for each, no boxes (iNaturalist's train2018.json).

    Categories with one name are told apart by their supercategory. Images of several categories, annotations of unknown images or
    categories, and what is listed again are skipped, counted and named. `content`: of the file, if it has been read.

    DataError: no such file, one without image labels, or categories that cannot be told apart.
    """
    content, skipped = read_json(path) if content is None else content, Skipped(list)
    if any(isinstance(entry, dict) and "bbox" in entry for entry in _entries(path, content, "annotations")):
        raise DataError(f"{path}: annotates boxes, not whole images; give a file with one category for each image")
    images = _by_id(_images(path, _entries(path, content, "images"), skipped))
    name_of = _unambiguous((key, name) for name, key, _ in images)
    class_of = _classes(path, content.get("categories"), skipped)
    found: dict[str, str | None] = {}
    unusable = Skipped(list)
    for position, entry in enumerate(_entries(path, content, "annotations")):
        entry = entry if isinstance(entry, dict) else {}
        name, label = name_of.get(_id(entry, "image_id")), class_of.get(_id(entry, "category_id"))
        if name is None:
            unusable["annotations of an image that is not listed, or shares its id with another"].append(_name(entry, position))
        elif label is None:
            unusable["annotations of a category that is not listed, or shares its id with another"].append(_name(entry, position))
        elif found.setdefault(name, label) != label:
            found[name] = None
    for name in [name for name, label in found.items() if label is None]:
        unusable["images of several categories"].append(name)
    labels = {name: label for name, _, _ in images if (label := found.get(name)) is not None}
    if not labels:
        reasons = "; ".join(f"{len(names)} {what}" for what, names in unusable.items()) or "it has no annotations"
        raise DataError(f"{path}: labels none of its {len(images)} images ({reasons}); give another file")
    warn_skipped(path, skipped | unusable)
    classes = tuple(dict.fromkeys(label for label in class_of.values() if label is not None))
    return ImageLabels(labels=labels, classes=classes, num_skipped=sum(map(len, unusable.values())))


def _classes(path: Path, listed: Any, skipped: Skipped) -> Mapping[Id | None, str | None]:
    """The name of each category by its id, in the order of the ids; categories without a name bear their id."""
    named: dict[tuple[str, str], list[Id]] = defaultdict(list)  # (name, supercategory) → ids
    for position, entry in enumerate(listed if isinstance(listed, list) else []):
        entry = entry if isinstance(entry, dict) else {}
        key = _id(entry, "id")
        if key is None:
            skipped["categories without an id"].append(_name(entry, position))
        elif key not in (ids := named[str(entry.get("name") or key), str(entry.get("supercategory") or "")]):
            ids.append(key)
    shared = {name for name, count in Counter(name for name, _ in named).items() if count > 1}
    for (name, above), ids in named.items():
        if len(ids) > 1:
            numbers = ", ".join(map(str, ids[:5]))
            raise DataError(f"{path}: several categories are named {name!r} (ids {numbers}); rename them, or join them to one")
        if name in shared and not above:
            raise DataError(f"{path}: several categories are named {name!r}; rename them, or join them to one")
    pairs = [(ids[0], f"{above}/{name}" if name in shared else name) for (name, above), ids in named.items()]
    if all(isinstance(key, int) for key, _ in pairs):
        pairs.sort(key=itemgetter(0))
    return _unambiguous(pairs)


def is_crowd(entry: dict[str, Any]) -> bool:
    """Whether an object is a crowd: "iscrowd" as a number, or as text."""
    return bool(_id(entry, "iscrowd"))


def rotate_boxes(boxes: NDArray[Any], *, orientation: int, size_px: tuple[int, int]) -> NDArray[Any]:
    """Boxes [M, 4] xyxy of an image stored as width × height `size_px`, in the frame of the upright one; `orientation`: EXIF's, 1 to 8."""
    corners = rotate_points(boxes.reshape(-1, 2, 2), orientation=orientation, size_px=size_px)
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def rotate_points(points: NDArray[Any], *, orientation: int, size_px: tuple[int, int]) -> NDArray[Any]:
    """Points […, 2], x and y, as `rotate_boxes`."""
    x, y = points[..., 0], points[..., 1]
    if orientation in (2, 3, 7, 8):
        x = size_px[0] - x
    if orientation in (3, 4, 6, 7):
        y = size_px[1] - y
    return np.stack([y, x] if orientation >= 5 else [x, y], axis=-1)


def read_json(path: Path, *, remedy: str = _REMEDY) -> Any:
    """The content of a JSON file. DataError if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error


def _only_images(path: Path) -> list[Any]:
    """The list under "images", parsed alone: 1 s for instances_train2017.json, the whole file 17 s. Empty where that fails."""
    try:
        text = path.read_text("utf-8-sig")
        start = _IMAGES_ARRAY.search(text)
        images = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    except (OSError, ValueError, RecursionError):
        return []
    return images if all(isinstance(image, dict) and _file_name(image) and "id" in image for image in images) else []


def _entries(path: Path, content: Any, key: str) -> list[Any]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path}: not a COCO-style annotation file (it has no list {key!r}); {_REMEDY}")
    return entries


def _images(path: Path, entries: list[Any], skipped: Skipped) -> list[_Named]:
    found = list(_named(entries, "images", _file_name, skipped))
    if entries and not found:
        raise DataError(f"{path}: not a COCO-style annotation file (no image has a name and an id); {_REMEDY}")
    return found


def _named(entries: list[Any], what: str, name_of: Callable[[dict[str, Any]], Any], skipped: Skipped) -> Iterator[_Named]:
    seen: set[str] = set()
    for position, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        name, key = str(name_of(entry) or ""), _id(entry, "id")
        if not name or key is None:
            skipped[f"{what} without a name or an id"].append(_name(entry, position))
            continue
        if name in seen:
            skipped[f"{what} listed again by the same name, merged"].append(name)
        seen.add(name)
        yield name, key, entry


def _by_id(found: list[_Named]) -> list[_Named]:
    return sorted(found, key=itemgetter(1)) if all(isinstance(key, int) for _, key, _ in found) else found


def _size_px(image: dict[str, Any]) -> tuple[int, int]:
    width, height = _id(image, "width"), _id(image, "height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def _unambiguous(pairs: Iterable[tuple[Id, Any]]) -> Mapping[Id | None, Any]:
    """Value of each id; None if several have it."""
    values: dict[Id | None, Any] = {}
    for key, value in pairs:
        values[key] = value if values.get(key, value) == value else None
    return values


def _id(entry: dict[str, Any], key: str) -> Id | None:
    """An id; 7, 7.0 and "7" are the same."""
    value = entry.get(key)
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < 19 else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def _file_name(image: dict[str, Any]) -> Any:
    return image.get("file_name") or str(image.get("coco_url") or "").rpartition("/")[2]  # LVIS has URLs alone


def _box(entry: dict[str, Any]) -> list[float] | None:
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
    except (KeyError, TypeError, ValueError):
        return None
    return [x, y, width, height] if width > 0 and height > 0 and np.isfinite([x, y, width, height]).all() else None


def _name(entry: dict[str, Any], position: int) -> str:
    return f"id {entry['id']}" if "id" in entry else f"number {position}"


def warn_skipped(path: Path, skipped: Mapping[str, list[str]]) -> None:
    """Count and name what is skipped of a file."""
    for what, names in skipped.items():
        log.warning("%s: %d %s: %s", path, len(names), what, ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else ""))
