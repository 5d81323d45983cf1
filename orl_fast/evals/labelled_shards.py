"""Labelled images as evaluations that train want them: packed like any others, with the class of every row, in two parts."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orl_fast.config import Section
from orl_fast.console import log
from orl_fast.distributed import decided
from orl_fast.errors import DataError, StaleError
from orl_fast.evals import Context
from orl_fast.evals.copies import copied_rows
from orl_fast.evals.layouts import (
    TRAIN_NAMES,
    VAL_NAMES,
    LabelList,
    base_folder,
    find_split,
    folder_classes,
    in_system_folder,
    numbered_as,
    read_labels,
    require_present,
)  # fmt: skip
from orl_fast.files import human_bytes, require_free_space
from orl_fast.places import SHARDS_HOME
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.shards.images import IMAGE_SUFFIXES
from orl_fast.shards.index import MANIFEST_NAME, Quarantined
from orl_fast.shards.labels import NEITHER, TRAIN, VAL, ImageClasses, read_classes, write_classes
from orl_fast.shards.sources import Listing, find_sources, list_images

# Pairs of lists that are found by their name: OpenSelfSup's, Places205's, iNaturalist's. `*` stands for the year.
_LISTS = (
    ("meta/train_labeled.txt", "meta/val_labeled.txt"),
    ("train_places205.csv", "val_places205.csv"),
    ("trainvalsplit_places205/train_places205.csv", "trainvalsplit_places205/val_places205.csv"),
    ("train20??.json", "val20??.json"),
    ("train.json", "val.json"),
)
_IMAGE_FOLDERS = ("images256", "images", "data/vision/torralba/deeplearning/images256")
_REMEDY = (
    "give a folder with train/ and val/, each with one subfolder of images per class; lists of labelled images with --train-list and "
    "--val-list; or a folder that orl-fast shard packed from such folders"
)


class LabelledShardsOptions(Section):
    """DATA is a folder with train/ and val/, each with one subfolder of images per class (ImageNet); or images that lists label:
    Places205's train_places205.csv and val_places205.csv or iNaturalist's train2018.json and val2018.json in DATA, or those of
    --train-list and --val-list (lines "path label" or "path,label", or iNaturalist's JSON). The images are packed below shards/, once;
    DATA may also be a folder of packed images whose file names have class folders. Images that cannot be used are skipped and counted."""

    val: Path | None = Field(default=None, description="Validation data: a folder of class folders or packed images [default: DATA/val].")
    train_list: Path | None = Field(default=None, description="Labels of the training images.")
    val_list: Path | None = Field(default=None, description="Labels of the validation images.")
    images: Path | None = Field(default=None, description="Folder that listed paths start from [default: found in DATA].")
    shards: Path | None = Field(default=None, description="Where the images are packed [default: shards/NAME-labelled].")


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Labelled images of a dataset."""

    index: ShardIndex
    labels: NDArray[np.int64]  # [N] class of each row of the index; -1: not of this part

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """[M] the images of this part, ascending."""
        return np.flatnonzero(self.labels >= 0)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledShards:
    """What to train on and what to test on."""

    train: Part
    val: Part
    classes: tuple[str, ...]
    num_skipped: int  # images that could not be packed, have no label, or are in the other part too
    dataset: str | None  # "imagenet", "places205", "inat18", as far as names tell
    fingerprint: str


def open_labelled_shards(data: Path, options: LabelledShardsOptions, context: Context) -> LabelledShards:
    """Pack the images unless that is done, and join them with their labels. One rank works, the others get what it found.

    DataError: no labelled images, one class, classes in the validation part that the training part lacks, an image in both, or lists that
    do not fit the images. StaleError: the folder to pack into holds something else.
    """
    return decided(lambda: _open(data, options, context), context.ranks)


def _open(data: Path, options: LabelledShardsOptions, context: Context) -> LabelledShards:
    if (packed := _packed_folder(data)) is not None:
        return _from_shards(packed, options)
    if not data.is_dir():
        raise DataError(f"{data}: {'is a file' if data.exists() else 'no such folder'}; {_REMEDY}")
    train, val = _layout(data, options)
    sources = _sources([_source(each) for each in (train, val)])
    out = options.shards or SHARDS_HOME / f"{data.resolve().name or 'images'}-labelled"
    if not (out / MANIFEST_NAME).is_file():
        listing = list_images(find_sources(sources))
        files = _Files([image.file_name for image in listing.images], [image.source for image in listing.images], listing.unreadable)
        _classes(*_join(files, sources, train, val), name=str(data))  # what would be refused is refused before it is packed
        _announce(listing, out, context)
    index = _pack(sources, out, context)
    labelled = _join_packed(index, sources, train, val, name=str(data))
    try:
        write_classes(index, _column(labelled))
    except DataError as error:
        log.warning("%s; the labels are not kept there", error)
    return labelled


@dataclass(frozen=True)
class _Files:
    """Images that are to be packed or have been packed, and what could not be."""

    names: Sequence[str]  # relative to their source
    sources: Sequence[int]
    bad: Sequence[Quarantined]

    @classmethod
    def of(cls, index: ShardIndex) -> Self:
        return cls(index.file_names, index.sources.tolist(), index.manifest.quarantined)


_Labels = list[str | None]  # [N] the class of each file or row
Rule = Path | tuple[LabelList, Path]  # a folder of class folders; or a list, and the folder that its paths start from


def _layout(data: Path, options: LabelledShardsOptions) -> tuple[Rule, Rule]:
    """Where the classes of the training and of the validation images come from."""
    train_folder, val_folder = find_split(data, TRAIN_NAMES) or (data if options.val else None), find_split(data, VAL_NAMES)
    if options.val is not None:
        if not options.val.is_dir():
            raise DataError(f"{options.val}: no such folder; give --val a folder with one subfolder of images per class")
        val_folder = find_split(options.val, VAL_NAMES) or options.val
    lists = options.train_list, options.val_list
    by_folder = train_folder is not None and val_folder is not None and has_class_folders(train_folder) and has_class_folders(val_folder)
    if not any(lists) and not by_folder:
        lists = _lists_in(data)
        if all(lists):
            log.info("%s: labels from %s and %s", data, *lists)
    rules: list[Rule] = []
    for part, path, folder in zip(("train", "val"), lists, (train_folder, val_folder), strict=True):
        if path is not None:
            labels = read_labels(path)
            near = [folder or data, data, *(data / name for name in _IMAGE_FOLDERS), path.parent, path.parent.parent, path.parent / part]
            rules.append((labels, base_folder(labels, [options.images] if options.images else near)))
        elif folder is None:
            raise DataError(f"{data}: has no {part}/, and no list of {part} images is given; {_REMEDY}")
        elif not has_class_folders(folder):
            num_flat = sum(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in os.listdir(folder))
            raise DataError(
                f"{folder}: holds no class folders, but {num_flat:,} images; sort them into one folder per class, or give their "
                f'labels with --{part}-list FILE (lines "path label")'
            )
        else:
            rules.append(folder)
    return rules[0], rules[1]


def has_class_folders(folder: Path) -> bool:
    """Whether some folder in it is not a system's."""
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not in_system_folder(entry.name) for entry in entries)


def _lists_in(data: Path) -> tuple[Path | None, Path | None]:
    for patterns in _LISTS:
        found = [sorted(data.glob(pattern)) for pattern in patterns]
        if all(len(paths) == 1 for paths in found):
            return found[0][0], found[1][0]
    return None, None


def _source(rule: Rule) -> Path:
    """The folder to pack: of a list, the deepest one that holds all its files."""
    if isinstance(rule, Path):
        return rule
    labels, base = rule
    return base / os.path.commonpath({os.path.dirname(name) for name in labels.labels})


def _sources(folders: Sequence[Path]) -> list[Path]:
    """Each once, without those within another."""
    kept: list[Path] = []
    for folder in sorted(folders, key=lambda each: len(each.resolve().parts)):
        if not any(folder.resolve().is_relative_to(other.resolve()) for other in kept):
            kept.append(folder)
    return sorted(kept, key=lambda each: [folder.resolve() for folder in folders].index(each.resolve()))


def _announce(listing: Listing, out: Path, context: Context) -> None:
    """Say what packing takes. DataError where the disk is too small."""
    images, folders = listing.images, [str(source.folder) for source in listing.sources]
    num_bytes = sum(image.num_bytes for image in images)
    require_free_space(out, num_bytes=num_bytes, purpose="packing")
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    what = f"{len(images):,} images of {' and '.join(folders)} into {out}"
    log.info("packing %s, once: %s, of %s free (--shards names another folder)", what, human_bytes(num_bytes), human_bytes(free))


def _pack(sources: Sequence[Path], out: Path, context: Context) -> ShardIndex:
    try:
        write_shards(sources, out, num_workers=context.num_threads * context.ranks.local_world_size)  # the node's other ranks wait
    except DataError as error:
        raise DataError(str(error).replace("with --out", "with --shards")) from error
    except StaleError as error:
        raise StaleError(
            f"{out}: packed from other images than {sources[0]} holds now; remove it, or choose another with --shards"
        ) from error
    return ShardIndex.open(out)


def _join_packed(index: ShardIndex, sources: Sequence[Path], train: Rule, val: Rule, *, name: str) -> LabelledShards:
    trained, tested, order = _join(_Files.of(index), sources, train, val)
    paths = [rule[0].path for rule in (train, val) if not isinstance(rule, Path)]
    hint = _dataset_of([*map(str, paths), name], by_json=any(path.suffix.lower() == ".json" for path in paths))
    return _labelled((index, trained), (index, tested), order=order, hint=hint, name=name)


def _join(files: _Files, sources: Sequence[Path], train: Rule, val: Rule) -> tuple[_Labels, _Labels, Sequence[str] | None]:
    """The classes of the training and of the validation images, and their order where a list has one."""
    if isinstance(train, Path) and not isinstance(val, Path):
        val = numbered_as(val[0], _ordered(_classes_of(files, sources, train))), val[1]
    elif isinstance(val, Path) and not isinstance(train, Path):
        train = numbered_as(train[0], _ordered(_classes_of(files, sources, val))), train[1]
    trained, tested = _classes_of(files, sources, train), _classes_of(files, sources, val)
    both = [name for name, *labels in zip(files.names, trained, tested, strict=True) if None not in labels]
    if both:
        raise DataError(
            f"{sources[0]}: {len(both)} images are to be trained on and to be validated, for example {both[0]}; give other parts"
        )
    return trained, tested, train[0].classes if not isinstance(train, Path) else None


def _classes_of(files: _Files, sources: Sequence[Path], rule: Rule) -> _Labels:
    """The class that a rule gives each file; None for those that it gives none."""
    folder = rule if isinstance(rule, Path) else rule[1]
    moved = [_relative_to(folder, source) for source in sources]
    names = [moved[source](name) for name, source in zip(files.names, files.sources, strict=True)]
    if isinstance(rule, Path):
        rows = [row for row, name in enumerate(names) if name is not None]
        classes: _Labels = [None] * len(names)
        for row, found in zip(rows, folder_classes([names[row] or "" for row in rows], root=folder), strict=True):
            classes[row] = found
        return classes
    labels, _ = rule
    there = {name for name in names if name is not None} | {moved[entry.source](entry.file_name) for entry in files.bad}
    require_present(labels, [name for name in labels.labels if name not in there], where=folder)
    return [labels.labels.get(name) if name is not None else None for name in names]


def _relative_to(folder: Path, source: Path) -> Callable[[str], str | None]:
    """What makes file names that are relative to `source` relative to `folder`; None for those that are not in there."""
    for one, other in ((folder, source), (folder.resolve(), source.resolve())):  # as they are named, or behind links
        outer, inner = os.path.relpath(other, one), os.path.relpath(one, other) + "/"
        if outer == ".":
            return lambda name: name
        if not outer.startswith(".."):
            return lambda name, prefix=outer: f"{prefix}/{name}"  # type: ignore[misc]
        if not inner.startswith(".."):
            return lambda name, prefix=inner: name.removeprefix(prefix) if name.startswith(prefix) else None  # type: ignore[misc]
    return lambda _: None


def _packed_folder(data: Path) -> Path | None:
    return next((folder for folder in (data, SHARDS_HOME / data) if (folder / MANIFEST_NAME).is_file()), None)


def _from_shards(folder: Path, options: LabelledShardsOptions) -> LabelledShards:
    """Packed images: with the column of labels, with lists, or with classes and parts from their file names."""
    index = ShardIndex.open(folder)
    sources = [Path(source.folder) for source in index.manifest.sources]
    if options.train_list is not None and options.val_list is not None:
        lists = [read_labels(path) for path in (options.train_list, options.val_list)]
        train, val = ((labels, _base_of(labels, index, sources)) for labels in lists)
        return _join_packed(index, sources, train, val, name=str(folder))
    if options.train_list is not None or options.val_list is not None:
        raise DataError(f"{folder}: packed images need both --train-list and --val-list, or neither")
    column = read_classes(index) if options.val is None else None
    if column is not None:
        parts = [np.where(column.splits == split, column.labels, -1) for split in (TRAIN, VAL)]
        named = [[column.classes[label] if label >= 0 else None for label in part.tolist()] for part in parts]
        return _labelled((index, named[0]), (index, named[1]), order=column.classes, hint=_dataset_of([str(folder)]), name=str(folder))
    trained, tested = _by_names(index)
    if options.val is not None:
        other = _packed_folder(options.val)
        if other is None:
            raise DataError(f"{options.val}: not a folder of packed images, as {folder} is; pack it with orl-fast shard {options.val}")
        other_index = ShardIndex.open(other)
        whole, held = _by_names(other_index, default=VAL)
        trained, _ = _by_names(index, default=TRAIN)
        tested = held if any(held) else whole
    else:
        other_index = index
    if not any(trained) or not any(tested):
        raise DataError(f"{folder}: no image is in a class folder of train/ and of val/ by its name; {_REMEDY}, or name them with --val")
    return _labelled((index, trained), (other_index, tested), order=None, hint=_dataset_of([str(folder)]), name=str(folder))


def _base_of(labels: LabelList, index: ShardIndex, sources: Sequence[Path]) -> Path:
    """The folder around the packed ones that a list's paths start from."""
    rows = range(0, len(index), max(1, len(index) // 2000))
    for source in sources:
        for base in (source, *source.parents):
            moved = [_relative_to(base, each) for each in sources]
            if any(moved[index.sources[row]](index.file_names[row]) in labels.labels for row in rows):
                return base
    raise DataError(f"{labels.path}: none of its files, for example {next(iter(labels.labels))}, is among the images of {index.path}")


def _by_names(index: ShardIndex, *, default: int = NEITHER) -> tuple[_Labels, _Labels]:
    """[N] classes of the training and of the validation images, by source folders or first folders named train and val.

    `default`: the split of what lies in neither.
    """
    split_of = {**dict.fromkeys(TRAIN_NAMES, TRAIN), **dict.fromkeys(VAL_NAMES, VAL)}
    names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for row, (name, source) in enumerate(zip(index.file_names, index.sources.tolist(), strict=True)):
        first, _, rest = name.partition("/")
        split = split_of.get(Path(index.manifest.sources[source].folder).name.lower())
        if split is None and first.lower() in split_of:
            split, name = split_of[first.lower()], rest
        split = default if split is None else split
        if split != NEITHER:
            names[split][row] = name
    found: tuple[_Labels, _Labels] = ([None] * len(index), [None] * len(index))
    for of_rows, classes in zip(names, found, strict=True):
        for row, label in zip(of_rows, folder_classes(list(of_rows.values()), root=index.path), strict=True):
            classes[row] = label
    return found


def _classes(trained: _Labels, tested: _Labels, order: Sequence[str] | None, *, name: str) -> tuple[str, ...]:
    """The classes that have training images, in order; DataError if they are too few, or the validation images have others."""
    present = {label for label in trained if label is not None}
    classes = tuple(label for label in order if label in present) if order is not None else tuple(_ordered(trained))
    if len(classes) < 2:
        raise DataError(f"{name}: {len(classes)} classes have training images; at least 2 are needed; {_REMEDY}")
    if unknown := sorted({label for label in tested if label is not None} - present):
        raise DataError(
            f"{name}: the validation images have {len(unknown)} classes that no training image has ({', '.join(unknown[:5])}); give both "
            "parts of one data set"
        )
    if not any(label is not None for label in tested):
        raise DataError(f"{name}: no validation image has a class; {_REMEDY}")
    return classes


def _labelled(
    train: tuple[ShardIndex, _Labels], val: tuple[ShardIndex, _Labels], *, order: Sequence[str] | None, hint: str | None,
    name: str,
) -> LabelledShards:  # fmt: skip
    """Number the classes, refuse what makes no sense, and leave out training images that are in the validation part too."""
    (index, trained), (val_index, tested) = train, val
    classes = _classes(trained, tested, order, name=name)
    number = {label: i for i, label in enumerate(classes)}
    parts = [
        Part(index=each, labels=np.array([-1 if label is None else number[label] for label in labels], np.int64))
        for each, labels in ((index, trained), (val_index, tested))
    ]
    twice = copied_rows(*((part.index, part.rows) for part in parts))
    if 2 * len(twice) > len(parts[0]):
        raise DataError(
            f"{name}: {len(twice)} of {len(parts[0])} training images are validation images too, for example "
            f"{index.file_names[twice[0]]}; give other validation data"
        )
    if len(twice):
        log.warning("%s: %d training images are validation images too, byte for byte: not trained on, for example %s", name, len(twice),
                    index.file_names[twice[0]])  # fmt: skip
        parts[0].labels[twice] = -1
        parts[0] = replace(parts[0])
    indices = [index] if index is val_index else [index, val_index]
    num_bad = sum(len(each.manifest.quarantined) for each in indices)
    num_skipped = num_bad + sum(map(len, indices)) - sum(map(len, parts))
    absent = len(classes) - len(np.unique(parts[1].labels[parts[1].rows]))
    used = f"{len(parts[0]):,} images of {len(classes):,} classes to train on, {len(parts[1]):,} of {len(classes) - absent:,} to validate"
    log.info("%s: %s; %d images not used, of which %d could not be packed", name, used, num_skipped, num_bad)
    synsets = sum(re.fullmatch(r"n\d{8}", label) is not None for label in classes) > len(classes) / 2
    content = [each.fingerprint for each in indices] + [hashlib.sha256(part.labels.tobytes()).hexdigest() for part in parts]
    return LabelledShards(
        train=parts[0], val=parts[1], classes=classes, num_skipped=num_skipped, dataset="imagenet" if synsets else hint,
        fingerprint=hashlib.sha256(repr((content, classes)).encode()).hexdigest()[:32],
    )  # fmt: skip


def _ordered(labels: Sequence[str | None]) -> list[str]:
    """The classes among labels, each once: numbers by value, others by name."""
    found = {label for label in labels if label is not None}
    return sorted(found, key=int) if all(map(str.isdecimal, found)) else sorted(found)


def _column(labelled: LabelledShards) -> ImageClasses:
    """Of images that were packed together."""
    train, val = labelled.train.labels, labelled.val.labels
    splits = np.where(train >= 0, TRAIN, np.where(val >= 0, VAL, NEITHER))
    return ImageClasses(
        classes=labelled.classes, labels=np.maximum(train, val).astype(np.int32), splits=splits.astype(np.int32)
    )  # fmt: skip


def _dataset_of(names: Sequence[str], *, by_json: bool = False) -> str | None:
    text = " ".join(names).lower()
    if "places205" in text or "places_205" in text:
        return "places205"
    if "inat" in text or by_json:
        return "inat18"
    return "imagenet" if "imagenet" in text or "ilsvrc" in text else None
