"""Labelled data for evaluations: class folders and lists, whose images are the objects, and COCO-style annotations, whose boxes are."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orl_fast.coco import labels_whole_images, read_annotations, read_json
from orl_fast.config import Section
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.copies import copied_files
from orl_fast.evals.layouts import (
    TRAIN_NAMES,
    VAL_NAMES,
    LabelList,
    base_folder,
    find_split,
    folder_classes,
    numbered_as,
    read_labels,
    require_present,
    warn,
)  # fmt: skip
from orl_fast.shards.sources import ListedImage, Source, list_images

_MIN_SIDE_PX = 8  # a smaller box shows nothing that could be recognized


class LabelledOptions(Section):
    """DATA is a folder with one subfolder of images per class, or with train/ and val/ of such; or a COCO folder or annotation file, whose
    ground-truth boxes are cut out and labelled by category; or a file that labels whole images (lines "path label" or "path,label", or
    iNaturalist's JSON). The test part is held out by image, so that no image is in both parts. Entries and images that cannot be used are
    skipped, counted and named."""

    annotations: Path | None = Field(default=None, description="COCO-style annotation file, in place of DATA.")
    images: Path | None = Field(default=None, description="Folder of that file's images.")
    test: Path | None = Field(default=None, description="Test data like DATA [default: DATA/val of DATA/train, else a part of DATA].")
    test_images: Path | None = Field(default=None, description="Folder of a test annotation file's images.")
    held_out: float = Field(default=0.3, gt=0, lt=1, description="That part.")
    size_px: int | None = Field(default=None, ge=8, description="Side of the encoded views in pixels [default: as in mining].")
    renderer: Literal["cpu", "gpu", "reference"] = Field(default="cpu", description="Renderer of the views.")
    seed: int = Field(default=0, ge=0, description="Of the held-out part and of validation.")


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects with a class: whole images, or boxes within them."""

    paths: tuple[Path, ...]  # the images
    images: NDArray[np.int64]  # [M] ascending, object m is in paths[images[m]]
    labels: NDArray[np.int64]  # [M] positions in `classes`
    classes: tuple[str, ...]  # names
    boxes: NDArray[np.float32] | None = None  # [M, 4] xyxy, pixels of the annotated image; None where an object is its whole image
    sizes_px: NDArray[np.int64] | None = None  # [N, 2] width and height of the annotated images, 0 where unknown; with boxes only
    num_skipped_images: int = 0  # annotated images that are not there
    num_skipped_objects: int = 0  # annotations that cannot be used

    def __len__(self) -> int:
        return len(self.labels)

    def of_images(self, chosen: NDArray[np.int64]) -> "Objects":
        """The objects of these images alone, given by ascending positions in `paths`."""
        kept = np.isin(self.images, chosen)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in chosen.tolist()),
            images=np.searchsorted(chosen, self.images[kept]).astype(np.int64),
            labels=self.labels[kept],
            boxes=None if self.boxes is None else self.boxes[kept],
            sizes_px=None if self.sizes_px is None else self.sizes_px[chosen],
        )


@lru_cache(maxsize=1)
def labelled_data(data: Path, options: LabelledOptions, context: Context) -> tuple[Objects, Objects]:
    """What to learn from and what to test on, with the same classes and no image in both; read once for all backbones of a context.

    DataError as `open_labelled`, `with_test` and `split_by_image` raise it.
    """
    test = options.test
    if data.is_dir() and not (data / "annotations").is_dir():
        train, own_test = find_split(data, TRAIN_NAMES), find_split(data, VAL_NAMES)
        if train is not None and (test or own_test):
            data, test = train, test or own_test
            log.info("training on %s, testing on %s", data, test)
    objects = open_labelled(data, images=options.images)
    if test is None:
        parts = split_by_image(objects, held_out=options.held_out, seed=options.seed)
    else:
        parts = with_test(objects, open_labelled(test, images=options.test_images))
    train_part, test_part = without_copies(*parts), parts[1]
    for part, purpose in ((train_part, "to learn from"), (test_part, "to test on")):
        what = "images" if part.boxes is None else "boxes"
        log.info(
            "%s: %d %s of %d classes, in %d images (%d images and %d annotations skipped)",
            purpose, len(part), what, len(np.unique(part.labels)), len(part.paths), part.num_skipped_images, part.num_skipped_objects,
        )  # fmt: skip
    return train_part, test_part


def open_labelled(path: Path, *, images: Path | None = None) -> Objects:
    """Open a folder of class folders, a COCO root or split, or a COCO-style annotation file. DataError if it is none or holds no object.

    Args:
        path: a folder with one subfolder per class (images at any depth below); or a folder with `annotations/` (its only
            instances_*.json is taken); or a split's folder next to that; or such a .json file; or a file that labels whole images
            (`read_labels`).
        images: the folder of an annotation file's images; by default the split's folder of COCO's layout, an `images` folder next to the
            file, or the file's own folder.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a folder with one subfolder per class, or a COCO-style annotation file")
    if path.is_file():
        content = read_json(path) if path.suffix.lower() == ".json" else None
        if content is None or labels_whole_images(content):
            return _from_list(path, images)
        return _from_coco(path, images or images_beside(path), content)
    annotations = path.resolve().parent / "annotations" / f"instances_{path.resolve().name}.json"
    if annotations.is_file():
        return _from_coco(annotations, images or path)
    if (path / "annotations").is_dir() or (path / "annotations.json").is_file():
        found = sorted(path.glob("annotations/instances_*.json")) + sorted(path.glob("annotations.json"))
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found) or "none"
            raise DataError(f"{path}: one annotation file is needed, found {names}; name one with --annotations")
        return _from_coco(found[0], images or images_beside(found[0]))
    return _from_folders(path)


def split_by_image(objects: Objects, *, held_out: float, seed: int) -> tuple[Objects, Objects]:
    """Hold out a share of the images for testing, the same share of each class as far as possible (by each image's first object).

    DataError if there are too few images to have both parts.
    """
    label_of_image = objects.labels[np.searchsorted(objects.images, np.arange(len(objects.paths)))]
    rng = np.random.default_rng(seed)
    test: list[int] = []
    for label in range(len(objects.classes)):
        members = np.flatnonzero(label_of_image == label)
        count = min(max(round(held_out * len(members)), 1), len(members) - 1)
        test += rng.permutation(members)[: max(count, 0)].tolist()
    if not test:
        raise DataError(f"{len(objects.paths)} labelled images are too few to hold some out for testing; give test data with --test")
    tested = np.array(sorted(test), np.int64)
    train = objects.of_images(np.setdiff1d(objects.images, tested))
    return train, replace(objects.of_images(tested), num_skipped_images=0, num_skipped_objects=0)


def with_test(train: Objects, test: Objects) -> tuple[Objects, Objects]:
    """Separate test data, its classes matched by name. DataError if it has a class that the training data lack, or an image of theirs.

    Numbers in place of names, as lists have them, are positions among the names.
    """
    train, test = _named_as(train, test), _named_as(test, train)
    unknown = sorted({test.classes[label] for label in test.labels.tolist()} - set(train.classes))
    if unknown:
        names = ", ".join(unknown[:5])
        raise DataError(f"the test data have classes that the training data lack: {names}; give data with the same classes")
    shared = {path.resolve() for path in train.paths} & {path.resolve() for path in test.paths}
    if shared:
        raise DataError(f"{min(shared)}: is in the training data and in the test data; give other test data")
    number = {name: i for i, name in enumerate(train.classes)}
    positions = np.array([number.get(name, -1) for name in test.classes], np.int64)
    return train, replace(test, labels=positions[test.labels], classes=train.classes)


def _from_folders(root: Path) -> Objects:
    if (root / "JPEGImages").is_dir():
        raise DataError(f"{root}: is in PASCAL VOC's layout, which has no class folders; use orl-fast eval voc07")
    listed, unreadable = _listed(root)
    names = sorted((image.file_name for image in listed), key=lambda name: name.split("/"))
    found = [(name, label) for name, label in zip(names, folder_classes(names, root=root), strict=True) if label is not None]
    classes = sorted({label for _, label in found})
    if len(classes) < 2:
        loose = sum("/" not in name for name in names)
        where = f' and {loose} images lie in none; label these by a file with lines "path label"' if loose else ""
        raise DataError(
            f"{root}: {len(classes)} subfolders hold images{where}; give a folder that has one subfolder for each of two or more classes"
        )
    warn(root, {"files or folders that cannot be read": unreadable})
    number = {label: i for i, label in enumerate(classes)}
    return Objects(
        paths=tuple(root / name for name, _ in found), images=np.arange(len(found)), classes=tuple(classes),
        labels=np.array([number[label] for _, label in found], np.int64), num_skipped_images=len(names) - len(found) + len(unreadable),
    )  # fmt: skip


def _listed(root: Path) -> tuple[list[ListedImage], list[str]]:
    """The images below a folder, but not those in hidden folders, and the names of what cannot be read."""
    try:
        listing = list_images([Source(folder=root, annotations=None)])
    except DataError:  # there is no image
        return [], []
    return listing.images, [entry.file_name for entry in listing.unreadable]


def _from_list(path: Path, images: Path | None) -> Objects:
    """Whole images, labelled by a file."""
    listed = read_labels(path)
    base = images or base_folder(listed, [path.parent, path.parent.parent, path.parent / path.stem, *_images_around(path)])
    there = [name for name in listed.labels if (base / name).is_file()]
    require_present(listed, [name for name in listed.labels if not (base / name).is_file()], where=base)
    used = {listed.labels[name] for name in there}
    classes = tuple(name for name in listed.classes if name in used)
    if len(classes) < 2:
        raise DataError(f"{path}: labels images of {len(classes)} classes; at least two are needed")
    number = {label: i for i, label in enumerate(classes)}
    return Objects(
        paths=tuple(base / name for name in there), images=np.arange(len(there)), classes=classes,
        labels=np.array([number[listed.labels[name]] for name in there], np.int64),
        num_skipped_images=len(listed.labels) - len(there), num_skipped_objects=listed.num_skipped,
    )  # fmt: skip


def _images_around(path: Path) -> list[Path]:
    """Folders near a list that its paths may start from: ImageNet's train/ and val/, Places205's images256/."""
    return [parent / name for parent in (path.parent, path.parent.parent) for name in (*TRAIN_NAMES, *VAL_NAMES, "images", "images256")]


def _named_as(objects: Objects, others: Objects) -> Objects:
    """With the others' class names, if these have names and the objects only numbers."""
    labels = LabelList(
        path=objects.paths[0].parent, labels={name: name for name in objects.classes}, classes=objects.classes, num_skipped=0
    )
    named = numbered_as(labels, others.classes)
    return objects if named is labels else replace(objects, classes=tuple(named.labels[name] for name in objects.classes))


def without_copies(train: Objects, test: Objects) -> Objects:
    """The training objects without images that are test images too, byte for byte; these are counted as skipped.

    DataError if that is most of the training images.
    """
    copies = copied_files(train.paths, test.paths)
    if not copies:
        return train
    if 2 * len(copies) > len(train.paths):
        raise DataError(
            f"{train.paths[copies[0]]}: this and {len(copies) - 1} more of {len(train.paths)} training images are test images too, byte "
            "for byte; give other test data"
        )
    log.warning("%d training images are test images too, byte for byte: skipped, for example %s", len(copies), train.paths[copies[0]])
    rest = np.setdiff1d(np.arange(len(train.paths)), copies)
    return replace(train.of_images(rest), num_skipped_images=train.num_skipped_images + len(copies))


def images_beside(annotations: Path) -> Path:
    """The folder of an annotation file's images, by its name and place; the file's own folder where there is none."""
    split = annotations.stem.removeprefix("instances_")
    root = annotations.parent.parent
    candidates = (root / split, root / "images" / split, annotations.parent / "images")
    return next((folder for folder in candidates if folder.is_dir()), annotations.parent)


def _from_coco(file: Path, folder: Path, content: Any = None) -> Objects:
    found = read_annotations(file, content)
    large = (found.boxes[:, 2:] - found.boxes[:, :2]).min(axis=1, initial=np.inf) >= _MIN_SIDE_PX
    named = found.labels >= 0
    if num_unnamed := int(np.sum(~named)):
        log.warning("%s: %d objects of categories that the file does not list: skipped", file, num_unnamed)
    wanted = np.unique(found.images[large & named])
    absent = [i for i in wanted.tolist() if not (folder / found.file_names[i]).is_file()]
    if absent:
        log.warning("%s: %d annotated images are not in %s, for example %s", file, len(absent), folder, found.file_names[absent[0]])
    kept = large & named & ~np.isin(found.images, absent)
    used, labels = np.unique(found.labels[kept], return_inverse=True)
    if len(used) < 2:
        raise DataError(f"{file}: {len(used)} classes have boxes on images in {folder}; name the images' folder with --images")
    everything = Objects(
        paths=tuple(folder / name for name in found.file_names),
        images=found.images[kept],
        labels=labels.astype(np.int64),
        classes=tuple(found.categories[label] for label in used.tolist()),
        boxes=found.boxes[kept].astype(np.float32),
        sizes_px=found.sizes_px,
        num_skipped_images=len(absent),
        num_skipped_objects=found.num_skipped + num_unnamed,
    )
    return everything.of_images(np.unique(everything.images))
