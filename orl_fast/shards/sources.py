"""Which images are packed, in which order, under which key and id."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, permutations
from pathlib import Path
from typing import Any, NamedTuple

from orl_fast.errors import DataError
from orl_fast.shards.manifest import Quarantined

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_MAX_KEY = 80  # with a number after it and ".json" it fits the 100 bytes of a tar header
_IMAGES_ARRAY = re.compile(r'"images"\s*:\s*(?=\[)')


class Source(NamedTuple):
    """A folder of images, and the COCO annotation file that gives their order and ids, if there is one."""

    folder: Path
    annotations: Path | None


class ListedImage(NamedTuple):
    """An image to pack: its source (by number), its path within the source, its id and key, and the size of its file."""

    source: int
    file_name: str
    image_id: int
    key: str
    num_bytes: int


@dataclass(kw_only=True)
class Listing:
    """All images to pack, in their final order, and what the sources told besides."""

    sources: tuple[Source, ...]
    images: list[ListedImage] = field(default_factory=list)
    unreadable: list[Quarantined] = field(default_factory=list)
    absent: list[list[str]] = field(default_factory=list)  # per source: listed in the annotation file, not on disk
    unlisted: list[int] = field(default_factory=list)  # per source: on disk, not in the annotation file

    def digest(self) -> str:
        """Names the listing: order, names, ids and file sizes, not where the folders lie. A change that keeps a file's size goes unseen."""
        digest = hashlib.sha256(repr((len(self.sources), self.unreadable, self.absent)).encode())
        for image in self.images:
            digest.update(repr(image).encode())
        return digest.hexdigest()


def find_sources(paths: Sequence[Path], *, splits: Sequence[str] = ()) -> tuple[Source, ...]:
    """The image folders meant by `paths`: COCO roots, COCO split folders, or any folders.

    A COCO root gives its split `train2017` (or the only one, or the only one named train*) unless `splits` names others.

    Raises:
        DataError: a path is missing, is no folder, is given twice, or has several splits to choose from.
    """
    for path in paths:
        if not path.is_dir():
            found = "is a file; give the folder that holds the images" if path.exists() else "no such folder; give a folder of images"
            raise DataError(f"{path}: {found}")
    roots = [_coco_splits(path) for path in paths]
    if splits and not any(roots):
        raise DataError(f"{paths[0]}: has no splits (folders with an annotation file); leave --split out, or give the folder itself")
    sources: list[Source] = []
    for path, found_splits in zip(paths, roots, strict=True):
        if found_splits:
            sources += [found_splits[name] for name in _chosen_splits(path, list(found_splits), splits)]
        else:
            sources.append(Source(folder=path, annotations=_annotations_of(path.resolve())))
    for one, other in permutations(sources, 2):
        if one.folder.resolve().is_relative_to(other.folder.resolve()):
            raise DataError(f"{one.folder}: lies within another source or is given twice ({other.folder}); give each folder once")
    return tuple(sources)


def list_images(sources: Sequence[Source]) -> Listing:
    """List the images of all sources in their order: first source first; within it, the annotation file's order, then by path.

    Images that no annotation file lists get the id after the largest id before them, so those of one plain folder are numbered from 0.

    Raises:
        DataError: a source holds no image at all, or its annotation file is damaged.
    """
    listing = Listing(sources=tuple(sources))
    taken: dict[str, int] = {}
    next_id = 0
    for number, source in enumerate(sources):
        on_disk, unreadable = _scan(source.folder)
        if not on_disk:
            raise DataError(f"{source.folder}: holds no images ({' '.join(sorted(SUFFIXES))}); give a folder of images")
        listing.unreadable += [Quarantined(source=number, file_name=name, reason=why) for name, why in sorted(unreadable.items())]
        ids = _listed_ids(source.annotations) if source.annotations else {}
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
    """The splits of a COCO root: folders, here or in images/, that have an annotation file."""
    splits: dict[str, Source] = {}
    parents = (root, root / "images") if (root / "annotations").is_dir() else ()
    for folder in (entry for parent in parents if parent.is_dir() for entry in sorted(parent.iterdir())):
        annotations = _annotations_of(folder)
        if annotations and folder.is_dir():
            splits.setdefault(folder.name, Source(folder=folder, annotations=annotations))
    return splits


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
    """The annotation file of a COCO split folder: in annotations/ beside it, or beside the images/ that holds it."""
    homes = [folder.parent, folder.parent.parent] if folder.parent.name == "images" else [folder.parent]
    candidates = (home / "annotations" / f"{kind}_{folder.name}.json" for home in homes for kind in ("instances", "image_info"))
    return next((path for path in candidates if path.is_file()), None)


def _listed_ids(path: Path) -> dict[str, int]:
    """File name → image id, in the file's order."""
    try:
        text = path.read_text(encoding="utf-8")
        images = _images_array(text) or json.loads(text)["images"]
        return {str(image["file_name"]): int(image["id"]) for image in images}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no COCO annotation file ({error!r}); mend it, or move it away to pack without it") from error


def _images_array(text: str) -> list[dict[str, Any]]:
    """The list under "images", parsed alone: 1 s for a file like instances_train2017.json, all of it 17 s. Empty where that fails."""
    start = _IMAGES_ARRAY.search(text)
    images = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    return images if all("file_name" in image and "id" in image for image in images) else []


def _scan(root: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Relative path → bytes of every image below `root`, and path → reason of what cannot be read.

    Links are followed, each folder is visited once (so a link that leads back ends there), hidden names are left out.
    """
    top = os.path.join(root, "")
    images: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    visited: set[tuple[int, int]] = set()

    def note(error: OSError) -> None:
        unreadable[error.filename.removeprefix(top)] = f"cannot be read: {error.strerror}"

    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=note):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
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
    """The path without its suffix, in plain characters: no dot, slash or space. The first comer keeps a name, later ones get a number.

    `taken` holds, for every key given, the number last put after it.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(file_name)[0])[-_MAX_KEY:]
    key = plain
    while key in taken:
        taken[plain] += 1
        key = f"{plain}-{taken[plain]}"
    taken[key] = 0
    return key
