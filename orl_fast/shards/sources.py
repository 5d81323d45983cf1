"""Which images are packed, in which order, under which keys and ids."""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, permutations
from pathlib import Path
from typing import NamedTuple

from orl_fast.coco import read_image_ids
from orl_fast.errors import DataError
from orl_fast.shards.images import IMAGE_SUFFIXES
from orl_fast.shards.index import Quarantined

_MAX_KEY = 80  # with a number and ".json" appended it fits the 100 bytes of a tar header


class Source(NamedTuple):
    """A folder of images, and the COCO annotation file that defines their order and ids, if there is one."""

    folder: Path
    annotations: Path | None


class ListedImage(NamedTuple):
    """An image to pack: its source (by position), its path within the source, its id and key, and the size of its file."""

    source: int
    file_name: str
    image_id: int
    key: str
    num_bytes: int


@dataclass(kw_only=True)
class Listing:
    """All images to pack, in their final order, and what is unusual about the sources."""

    sources: tuple[Source, ...]
    images: list[ListedImage] = field(default_factory=list)
    unreadable: list[Quarantined] = field(default_factory=list)
    absent: list[list[str]] = field(default_factory=list)  # per source: listed in the annotation file, not on disk
    unlisted: list[int] = field(default_factory=list)  # per source: on disk, not in the annotation file

    def digest(self) -> str:
        """Identifies the listing: order, names, ids and file sizes, but not where the folders are or what the files hold."""
        digest = hashlib.sha256(repr((len(self.sources), self.unreadable, self.absent)).encode())
        for image in self.images:
            digest.update(repr(image).encode())
        return digest.hexdigest()


def find_sources(paths: Sequence[Path], *, splits: Sequence[str] = ()) -> tuple[Source, ...]:
    """The image folders that `paths` refer to: COCO roots, COCO split folders, or any folders.

    Of a COCO root, the split `train2017` is used (or the only one, or the only one named train*) unless `splits` names others.
    DataError if a path is missing, not a folder, given twice, or has several splits to choose from.
    """
    for path in paths:
        if not path.is_dir():
            found = "is a file, not a folder" if path.exists() else "no such folder"
            raise DataError(f"{path}: {found}; give a folder of images")
    roots = [_coco_splits(path) for path in paths]
    if splits and not any(roots):
        raise DataError(f"{paths[0]}: has no splits (folders with an annotation file); omit --split, or give the folder itself")
    sources: list[Source] = []
    for path, found_splits in zip(paths, roots, strict=True):
        whole = Source(folder=path, annotations=_annotations_of(path.resolve()))
        sources += [found_splits[name] for name in _chosen_splits(path, list(found_splits), splits)] if found_splits else [whole]
    for one, other in permutations(sources, 2):
        if one.folder.resolve().is_relative_to(other.folder.resolve()):
            raise DataError(f"{one.folder}: lies within another source or is given twice ({other.folder}); give each folder once")
    return tuple(sources)


def list_images(sources: Sequence[Source]) -> Listing:
    """List the images of all sources in order: source by source; within one, those of the annotation file first, then the others by path.

    Images that are not in an annotation file get the id after the largest id before them, so a plain folder is numbered from 0.
    DataError if a source holds no images, or its annotation file is damaged.
    """
    listing = Listing(sources=tuple(sources))
    taken: dict[str, int] = {}
    next_id = 0
    for number, source in enumerate(sources):
        on_disk, unreadable = _scan(source.folder)
        if not on_disk:
            raise DataError(f"{source.folder}: holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); give a folder of images")
        listing.unreadable += [Quarantined(source=number, file_name=name, reason=why) for name, why in sorted(unreadable.items())]
        ids = read_image_ids(source.annotations) if source.annotations else {}
        listing.absent.append([name for name in ids if name not in on_disk])
        next_id = max(next_id, 1 + max(ids.values(), default=-1))
        unlisted = sorted(on_disk.keys() - ids.keys())
        listing.unlisted.append(len(unlisted) if source.annotations else 0)
        ids |= zip(unlisted, count(next_id))
        next_id += len(unlisted)
        found = ((name, image_id) for name, image_id in ids.items() if name in on_disk)
        listing.images += [ListedImage(number, name, image_id, _unique_key(name, taken), on_disk[name]) for name, image_id in found]
    return listing


def _coco_splits(root: Path) -> dict[str, Source]:
    """The splits of a COCO root: folders, in it or in its images/, that have an annotation file."""
    patterns = ("images/*/", "*/") if (root / "annotations").is_dir() else ()  # the folder next to images/ wins
    found = ((folder, _annotations_of(folder)) for pattern in patterns for folder in sorted(root.glob(pattern)))
    return {folder.name: Source(folder=folder, annotations=annotations) for folder, annotations in found if annotations}


def _chosen_splits(root: Path, found: list[str], wanted: Sequence[str]) -> Sequence[str]:
    for name in wanted:
        if name not in found:
            raise DataError(f"{root}: has no split {name!r} with an annotation file; it has {', '.join(found)}")
    if wanted:
        return wanted
    for candidates in (["train2017"], found, [name for name in found if name.startswith("train")]):
        if len(candidates) == 1 and candidates[0] in found:
            return candidates
    raise DataError(f"{root}: has several splits ({', '.join(found)}); choose with --split")


def _annotations_of(folder: Path) -> Path | None:
    """The annotation file of a COCO split folder: in annotations/ next to it, or next to the images/ that contains it."""
    homes = [folder.parent, folder.parent.parent] if folder.parent.name == "images" else [folder.parent]
    candidates = (home / "annotations" / f"{kind}_{folder.name}.json" for home in homes for kind in ("instances", "image_info"))
    return next((path for path in candidates if path.is_file()), None)


def _scan(root: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Relative path → size in bytes of every image below `root` that is not hidden, and path → reason of every one that cannot be read."""
    top = os.path.join(root, "")
    images: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    visited: set[str] = set()  # links are followed: those in a circle end here

    def note(error: OSError) -> None:
        unreadable[error.filename.removeprefix(top)] = f"cannot be read: {error.strerror}"

    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=note):
        if (real := os.path.realpath(folder)) in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                continue
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError as error:
                note(error)
                continue
            if stat.S_ISREG(status.st_mode):
                images[path.removeprefix(top)] = status.st_size
            else:
                unreadable[path.removeprefix(top)] = "not a regular file"
    return images, unreadable


def _unique_key(file_name: str, taken: dict[str, int]) -> str:
    """The path without its suffix, in plain characters (no dot, slash or space), with a number appended if the key is `taken`."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(file_name)[0])[-_MAX_KEY:]
    key = plain
    while key in taken:  # its value is the last number appended to the key
        taken[plain] += 1
        key = f"{plain}-{taken[plain]}"
    taken[key] = 0
    return key
