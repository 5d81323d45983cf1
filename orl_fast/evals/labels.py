"""Labelled data for evaluations: folders with one subfolder per class, and COCO-style annotations, whose boxes are the objects."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_MIN_SIDE_PX = 8  # a smaller box shows nothing that could be recognized


@dataclass(frozen=True, kw_only=True)
class LabelledObjects:
    """Objects with a class: whole images, or boxes within them.

    Attributes:
        paths: the images.
        images: [M] int64, object m shows paths[images[m]].
        labels: [M] int64, positions in `classes`.
        classes: names.
        boxes: [M, 4] float32 xyxy, pixels of the upright image; None where an object is its whole image.
    """

    paths: tuple[Path, ...]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    boxes: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def of_images(self, chosen: NDArray[np.int64]) -> "LabelledObjects":
        """The objects of these images (positions in `paths`) alone."""
        kept = np.isin(self.images, chosen)
        new_position = np.cumsum(np.isin(np.arange(len(self.paths)), chosen)) - 1
        return LabelledObjects(
            paths=tuple(self.paths[i] for i in sorted(set(chosen.tolist()))),
            images=new_position[self.images[kept]].astype(np.int64),
            labels=self.labels[kept],
            classes=self.classes,
            boxes=None if self.boxes is None else self.boxes[kept],
        )


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """What an evaluation learns from and what it is scored on. No image is in both; the classes are the same."""

    train: LabelledObjects
    test: LabelledObjects


def open_labelled(path: Path, *, images: Path | None = None) -> LabelledObjects:
    """Open a folder of class folders, a COCO root or split, or a COCO-style annotation file.

    Args:
        path: a folder with one subfolder per class (images at any depth below); or a folder with `annotations/` (its only
            instances_*.json is taken); or a split's folder beside that; or such a .json file.
        images: where an annotation file's images lie; by default the split's folder of COCO's layout, an `images` folder beside the
            file, or the file's own folder.
    Raises:
        DataError: it is none of these, is damaged, or holds no labelled object.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a folder with one subfolder per class, or a COCO-style annotation file")
    if path.is_file():
        return _from_coco(path, images or _images_beside(path))
    beside = path.resolve().parent / "annotations" / f"instances_{path.resolve().name}.json"
    if beside.is_file():
        return _from_coco(beside, images or path)
    if (path / "annotations").is_dir() or (path / "annotations.json").is_file():
        found = sorted(path.glob("annotations/instances_*.json")) + sorted(path.glob("annotations.json"))
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found) or "none"
            raise DataError(f"{path}: one annotation file is needed, found {names}; name one with --annotations")
        return _from_coco(found[0], images or _images_beside(found[0]))
    return _from_folders(path)


def split_by_image(objects: LabelledObjects, *, held_out: float, seed: int) -> LabelledData:
    """Hold out a share of the images for testing, the same share of each class as far as possible (by each image's first object).

    Raises:
        DataError: too few images to have both parts.
    """
    first_object = np.full(len(objects.paths), -1, np.int64)
    first_object[objects.images[::-1]] = np.arange(len(objects))[::-1]
    rng = np.random.default_rng(seed)
    test: list[int] = []
    for label in range(len(objects.classes)):
        members = np.flatnonzero((first_object >= 0) & (objects.labels[first_object] == label))
        count = min(max(round(held_out * len(members)), 1), len(members) - 1)
        test += rng.permutation(members)[: max(count, 0)].tolist()
    if not test:
        raise DataError(f"{len(objects.paths)} labelled images are too few to hold some out for testing; give test data with --test")
    tested = np.array(sorted(test), np.int64)
    trained = np.setdiff1d(np.unique(objects.images), tested)
    return LabelledData(train=objects.of_images(trained), test=objects.of_images(tested))


def with_test(train: LabelledObjects, test: LabelledObjects) -> LabelledData:
    """Test data of its own, its classes matched by name.

    Raises:
        DataError: it has a class that the training data lack, or an image of theirs.
    """
    unknown = sorted({test.classes[label] for label in test.labels.tolist()} - set(train.classes))
    if unknown:
        names = ", ".join(unknown[:5])
        raise DataError(f"the test data have classes that the training data lack: {names}; give data with the same classes")
    shared = {path.resolve() for path in train.paths} & {path.resolve() for path in test.paths}
    if shared:
        raise DataError(f"{min(shared)}: is in the training data and in the test data; give other test data")
    position = np.array([train.classes.index(name) if name in train.classes else -1 for name in test.classes], np.int64)
    renamed = LabelledObjects(paths=test.paths, images=test.images, labels=position[test.labels], classes=train.classes, boxes=test.boxes)
    return LabelledData(train=train, test=renamed)


def _from_folders(root: Path) -> LabelledObjects:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    per_class = [sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES) for folder in folders]
    classes = [(folder.name, files) for folder, files in zip(folders, per_class, strict=True) if files]
    if len(classes) < 2:
        raise DataError(f"{root}: {len(classes)} subfolders hold images; give a folder that has one for each of two or more classes")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for _, files in classes])
    paths = tuple(file for _, files in classes for file in files)
    names = tuple(name for name, _ in classes)
    return LabelledObjects(paths=paths, images=np.arange(len(paths), dtype=np.int64), labels=labels, classes=names)


def _images_beside(annotations: Path) -> Path:
    split = annotations.stem.removeprefix("instances_")
    root = annotations.parent.parent
    candidates = (root / split, root / "images" / split, annotations.parent / "images")
    return next((folder for folder in candidates if folder.is_dir()), annotations.parent)


def _from_coco(annotations: Path, images: Path) -> LabelledObjects:
    try:
        values: dict[str, Any] = json.loads(annotations.read_bytes())
        names = {int(entry["id"]): str(entry["name"]) for entry in values["categories"]}
        files = {int(entry["id"]): str(entry["file_name"]) for entry in values["images"]}
        objects = [
            (int(entry["image_id"]), int(entry["category_id"]), [float(part) for part in entry["bbox"]])
            for entry in values["annotations"]
            if not entry.get("iscrowd") and min(entry["bbox"][2:]) >= _MIN_SIDE_PX
        ]
        present = {image for image in {image for image, _, _ in objects} if (images / files[image]).is_file()}
        objects = [entry for entry in objects if entry[0] in present]
        category_ids = sorted({category for _, category, _ in objects})
        classes = tuple(names[category] for category in category_ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotations}: is no COCO-style annotation file with boxes ({error!r}); give another") from error
    if len(classes) < 2:
        raise DataError(f"{annotations}: {len(classes)} classes have boxes on images in {images}; name the images' folder with --images")
    position = {image: number for number, image in enumerate(sorted(present))}
    boxes_xywh = np.array([box for _, _, box in objects], np.float32)
    return LabelledObjects(
        paths=tuple(images / files[image] for image in position),
        images=np.array([position[image] for image, _, _ in objects], np.int64),
        labels=np.searchsorted(category_ids, [category for _, category, _ in objects]).astype(np.int64),
        classes=classes,
        boxes=np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1),
    )
