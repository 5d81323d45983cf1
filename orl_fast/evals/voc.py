"""PASCAL VOC's layout: images with a label for each class. What cannot be used is skipped, counted and named."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from orl_fast.console import log
from orl_fast.errors import DataError

YEAR = "VOC2007"
NUM_CLASSES = 20
SPLITS = ("trainval", "test")
_NAMED = 3  # of many, in messages
_MAX_DEPTH = 3  # of the VOC folder below the one given
_OTHER_YEARS = re.compile(r"VOC20\d\d")  # names of folders
_LATER_YEARS = re.compile(r"20(0[89]|1\d)_\d{6}")  # names of their images; those of 2007 are numbers
_LOOKED_FOR = (
    f"a folder with JPEGImages/ and ImageSets/Main/ (CLASS_trainval.txt and CLASS_test.txt), named {YEAR}: give it, VOCdevkit, or the "
    "folder into which VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar were unpacked"
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images by ascending name."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int8]  # [N, C] 1: present; -1: absent; 0: difficult, that is present in objects marked as difficult only
    num_missing: int  # listed images without a file or without labels, left out


@dataclass(frozen=True, kw_only=True)
class VocData:
    """The two parts of VOC2007, without a common image."""

    classes: tuple[str, ...]
    trainval: Split
    test: Split


def read_voc(data: Path) -> VocData:
    """Read VOC2007, or a data set in its layout.

    Labels are those of ImageSets/Main/CLASS_SPLIT.txt (1, 0 for difficult, -1). For a split without these files, they come from the
    Annotations of the images in ImageSets/Main/SPLIT.txt, with the same meaning: 0 if all objects of the class in the image are difficult.
    An image that a class's file does not list is difficult for that class, as in the reference.

    Args:
        data: VOC2007, VOCdevkit, or a folder above; the splits may be in different devkits.
    Raises:
        DataError: it is something else or of another year, a split is missing, is there twice or has no images, or shares an image with
            the other.
    """
    folders = _voc_folders(data)
    labelled = {split: _labels(folders, split, data) for split in SPLITS}
    num_unlabelled = {split: _count_unlabelled(folders, split, labelled[split]) for split in SPLITS}
    names = sorted({name for entries in labelled.values() for labels in entries.values() for name in labels})
    shared = sorted(labelled["trainval"].keys() & labelled["test"].keys())
    if shared:
        raise DataError(f"{data}: {len(shared)} images are in both trainval and test ({_some(shared)}); give disjoint splits")
    if len(names) != NUM_CLASSES:
        log.info("%s: %d classes; %s has %d", data, len(names), YEAR, NUM_CLASSES)
    trainval, test = (_split(folders, split, labelled[split], names, num_unlabelled[split]) for split in SPLITS)
    _compare(trainval, test)
    return VocData(classes=tuple(names), trainval=trainval, test=test)


def _voc_folders(data: Path) -> list[Path]:
    """The VOC folders at or below the one given, those of other years left out."""
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; looked for {_LOOKED_FOR}")
    found = list({folder.resolve(): folder for folder in _walk(data.resolve(), _MAX_DEPTH)}.values())  # links may lead to one twice
    right = [folder for folder in found if folder.name.startswith(YEAR)]
    right = right or [folder for folder in found if not _OTHER_YEARS.match(folder.name)]
    if not right and found:
        years = _some([folder.name for folder in found])
        raise DataError(f"{data}: holds {years}; this is the protocol of {YEAR}, whose test labels are public; looked for {_LOOKED_FOR}")
    if not right:
        raise DataError(f"{data}: not PASCAL VOC; looked for {_LOOKED_FOR}")
    for folder in sorted(set(found) - set(right)):
        log.info("%s: not used, this is the protocol of %s", folder, YEAR)
    return right


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    entries: list[Path] = []
    try:
        if (folder / "ImageSets" / "Main").is_dir():
            yield folder
        elif depth:
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "@")) and entry.is_dir())
    except OSError as error:
        log.warning("%s: not searched for %s (%s)", folder, YEAR, error.strerror)
    for entry in entries:
        yield from _walk(entry, depth - 1)


def _labels(folders: Sequence[Path], split: str, data: Path) -> dict[str, dict[str, int]]:
    """Image name → class name → label, from the one folder that has the split."""
    by_class = {folder: _class_files(folder, split) for folder in folders}
    having = [folder for folder in folders if by_class[folder]]
    if not having:
        having = [folder for folder in folders if (folder / "Annotations").is_dir() and _list_file(folder, split).is_file()]
    if not having:
        also = f" (it is in VOC{split}_06-Nov-2007.tar)"
        raise DataError(
            f"{data}: no labels of {split}{also}: no CLASS_{split}.txt in {_some([str(f / 'ImageSets/Main') for f in folders])}"
        )
    if len(having) > 1:
        raise DataError(f"{data}: {split} is there {len(having)} times ({_some(list(map(str, having)))}); name one folder")
    found = _from_class_files(by_class[having[0]]) if by_class[having[0]] else _from_annotations(having[0], split)
    if not found:
        raise DataError(f"{having[0]}: {split} lists no labelled image; unpack VOC{split}_06-Nov-2007.tar again")
    if all(_LATER_YEARS.fullmatch(name) for name in found):
        raise DataError(f"{having[0]}: {split} lists images of a later year ({_some(sorted(found))}); this is the protocol of {YEAR}")
    return found


def _count_unlabelled(folders: Sequence[Path], split: str, labels: dict[str, dict[str, int]]) -> int:
    """How many images of SPLIT.txt have no label of any class."""
    unlabelled = sorted({name for folder in folders for name in _listed(folder, split)} - labels.keys())
    _warn(unlabelled, f"%d images of {split}.txt without labels, skipped")
    return len(unlabelled)


def _listed(folder: Path, split: str) -> list[str]:
    file = _list_file(folder, split)
    return [line.split()[0] for line in _text(file).splitlines() if line.strip()] if file.is_file() else []


def _list_file(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def _class_files(folder: Path, split: str) -> dict[str, Path]:
    """Class name → file."""
    ending = f"_{split}.txt"
    return {file.name.removesuffix(ending): file for file in sorted((folder / "ImageSets" / "Main").glob(f"?*{ending}"))}


def _from_class_files(files: dict[str, Path]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(files, 0))
    seen: dict[str, set[str]] = {}
    for name, file in files.items():
        entries: dict[str, int] = {}
        odd, again = [], []
        for number, line in enumerate(_text(file).splitlines(), start=1):
            match line.split():
                case [image, ("1" | "+1" | "0" | "-1") as label]:
                    if image in entries:
                        again.append(image)
                    entries.setdefault(image, int(label))
                case []:
                    pass
                case _:
                    odd.append(f"line {number}")
        _warn(odd, f"{file}: %d lines without an image and a label of 1, 0 or -1, skipped")
        _warn(again, f"{file}: %d images listed again, the first label kept")
        for image, value in entries.items():
            found[image][name] = value
        seen[name] = set(entries)
    for name, images in seen.items():
        _warn(sorted(found.keys() - images), f"{files[name]}: %d images of other classes' files are not in it, difficult for {name}")
    return dict(found)


def _from_annotations(folder: Path, split: str) -> dict[str, dict[str, int]]:
    """From Annotations/*.xml, without images whose file is missing or damaged."""
    found: dict[str, dict[str, int]] = {}
    for image in dict.fromkeys(_listed(folder, split)):
        labels: dict[str, int] = {}
        try:
            for entry in ElementTree.fromstring((folder / "Annotations" / f"{image}.xml").read_bytes()).iter("object"):
                name = (entry.findtext("name") or "").strip()
                difficult = (entry.findtext("difficult") or "0").strip() not in ("", "0")
                if name:
                    labels[name] = max(labels.get(name, 0), 0 if difficult else 1)
        except (OSError, ElementTree.ParseError, ValueError):
            continue
        found[image] = labels
    log.info("%s: no CLASS_%s.txt; the labels of %d images come from Annotations", folder, split, len(found))
    return found


def _split(folders: Sequence[Path], split: str, labels: dict[str, dict[str, int]], classes: Sequence[str], num_unlabelled: int) -> Split:
    """The images that have a file, in any of the folders."""
    paths = {name: _image(folders, name) for name in sorted(labels)}
    missing = [name for name, path in paths.items() if path is None]
    _warn(missing, f"%d images of {split} are not in JPEGImages, skipped")
    there = {name: path for name, path in paths.items() if path is not None}
    if not there:
        raise DataError(f"{folders[0]}: none of the {len(paths)} images of {split} is in JPEGImages ({_some(missing)}); unpack the images")
    values = [[labels[name].get(each, -1) for each in classes] for name in there]
    array = np.array(values, np.int8).reshape(len(there), -1)
    return Split(paths=tuple(there.values()), labels=array, num_missing=len(missing) + num_unlabelled)


def _image(folders: Sequence[Path], name: str) -> Path | None:
    candidates = (folder / "JPEGImages" / f"{name}{suffix}" for folder in folders for suffix in (".jpg", ".JPG", ".jpeg", ".png"))
    return next((path for path in candidates if path.is_file()), None)


def _compare(trainval: Split, test: Split) -> None:
    """Warn of images that are in both splits under different names: files with the same bytes."""
    sizes = [{path: path.stat().st_size for path in part.paths} for part in (trainval, test)]
    common = set(sizes[0].values()) & set(sizes[1].values())
    digests = [{_digest(path): path.stem for path, size in part.items() if size in common} for part in sizes]
    same = [f"{digests[0][key]} = {digests[1][key]}" for key in sorted(digests[0].keys() & digests[1].keys())]
    _warn(same, "%d images are in both trainval and test, under other names: the score is too high")


def _digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:  # skipped and named later
        return str(path).encode()


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); unpack it again") from error


def _warn(names: Sequence[str], message: str) -> None:
    if names:
        log.warning(f"{message}: {_some(names)}", len(names))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
