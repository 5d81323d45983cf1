"""Which class the image files of a data set have: by class folders, by a list file, or by an annotation file without boxes."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from orl_fast.coco import read_image_labels
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.shards.images import IMAGE_SUFFIXES

MAX_MISSING = 0.01  # share of a list's entries that may lack their file; more, and the data is incomplete or the folder is a wrong one
# What operating systems and network storage put next to photographs, by lower-case name; so do folders whose name starts with a dot.
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "recycler", "lost+found",
     "system volume information")
)  # fmt: skip
TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "valid", "validation", "test", "testing")
_SPLIT = re.compile(r"(?P<kind>train|val|test|dev|eval)(ing|id|idation)?[-_]?(\d{2,4})?", re.IGNORECASE)
_NAMED = 3  # skipped entries that a message names


@dataclass(frozen=True, kw_only=True)
class LabelList:
    """The classes of files, as a list file or an annotation file has them."""

    path: Path
    labels: Mapping[str, str]  # file name, relative to a folder that is not known here → class
    classes: tuple[str, ...]  # in order
    num_skipped: int  # entries that cannot be used


def find_split(root: Path, names: Sequence[str]) -> Path | None:
    """The subfolder with the first of these names, in any case."""
    found = {entry.name.lower(): entry for entry in sorted(root.iterdir(), reverse=True) if entry.name.lower() in names and entry.is_dir()}
    return next((found[name] for name in names if name in found), None)


def in_system_folder(file_name: str) -> bool:
    """Whether some folder of a relative path is hidden or a system's: Synology's `@eaDir`, `.thumbnails`, `__MACOSX`, …"""
    return any(part[:1] == "." or part.lower() in _SYSTEM_FOLDERS for part in file_name.split("/"))


def folder_classes(file_names: Sequence[str], *, root: Path) -> list[str | None]:
    """The class of each file, given relative to `root`: its first folder. None in system folders, and for files in no folder.

    DataError where folders of folders leave open which of them are the classes: `a/abbey/1.jpg` would make a class `a`.
    """
    found: list[str | None] = []
    num_system = num_loose = 0
    direct, nested = False, defaultdict[str, set[str]](set)
    for name in file_names:
        first, _, rest = name.partition("/")
        if in_system_folder(name):
            num_system += 1
        elif not rest:
            num_loose += 1
        else:
            direct |= "/" not in rest
            nested[first].add(rest.partition("/")[0])
            found.append(first)
            continue
        found.append(None)
    kinds = {match["kind"].lower() for first in nested if (match := _SPLIT.fullmatch(first))}
    if "train" in kinds and len(kinds) > 1:
        raise DataError(
            f"{root}: its folders ({', '.join(sorted(nested)[:4])}) are named like parts of a data set, not like classes; give the part "
            "that has class folders, or one with train/ and val/"
        )
    if not direct and (several := next((first for first, folders in nested.items() if len(folders) > 1), None)):
        example = ", ".join(f"{several}/{name}" for name in sorted(nested[several])[:2])
        raise DataError(
            f"{root}: its folders hold folders ({example}, …), and which of them are classes is not known; label the images by a list file "
            '(lines "path label"), or make one folder for each class'
        )
    if num_system:
        log.warning("%s: %d images in hidden or system folders: skipped", root, num_system)
    if num_loose and nested:
        log.warning("%s: %d images in no class folder: skipped", root, num_loose)
    return found


def read_labels(path: Path) -> LabelList:
    """Read a list file (lines "path label" or "path,label") or an annotation file that labels whole images (.json).

    Lines that name no image, and files listed with several classes, are skipped, counted and named. DataError: no such file, or a list
    of something else.
    """
    if path.suffix.lower() == ".json":
        annotated = read_image_labels(path)
        return LabelList(path=path, labels=annotated.labels, classes=annotated.classes, num_skipped=annotated.num_skipped)
    found: dict[str, str | None] = {}
    several, odd = [], []
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        cut = max(line.rfind(separator) for separator in " ,\t")  # the label is what follows the last one
        name, label = clean_name(line[:cut].rstrip(" ,\t")), line[cut + 1 :].strip("\"'")
        if cut < 0 or not label or not is_image(name):
            odd.append(f"line {number}: {line[:80]!r}")
            continue
        label = str(int(label)) if label.isdecimal() else label
        if re.fullmatch(r"-\d+", label):
            raise DataError(f"{path}: line {number}: label {label} is out of range (0 and up); give a list of labelled images")
        if found.setdefault(name, label) not in (label, None):
            found[name] = None
            several.append(name)
    labels = {name: label for name, label in found.items() if label is not None}
    if not labels or len(odd) > max(1, MAX_MISSING * len(lines)):  # one may be the header
        what = f"{len(odd)} of {len(lines)} lines are no path and label" + (f" ({odd[0]})" if odd else "")
        raise DataError(f'{path}: {what}; lines must read "path label" or "path,label"')
    warn(path, {"lines without a path and a label": odd, "files with several labels": several})
    classes = set(labels.values())
    ordered = sorted(classes, key=int) if all(map(str.isdecimal, classes)) else sorted(classes)
    return LabelList(path=path, labels=labels, classes=tuple(ordered), num_skipped=len(odd) + len(several))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, stripped. DataError if it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a text file with one image per line") from error
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def clean_name(text: str) -> str:
    """A listed path without quotes, `./` and a leading `/`, which some lists have."""
    name = text.strip().strip("\"'")
    return re.sub(r"^(\.?/)+", "", name) if name[:1] in ("/", ".") else name


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def numbered_as(labels: LabelList, classes: Sequence[str]) -> LabelList:
    """A list whose labels are the positions of `classes`, which have names of their own: with these names.

    DataError for a label beyond the classes, as where a list counts from 1.
    """
    if not all(map(str.isdecimal, labels.classes)) or any(map(str.isdecimal, classes)):
        return labels
    highest = max(map(int, labels.classes))
    if highest >= len(classes):
        raise DataError(
            f"{labels.path}: label {highest} is out of range: there are {len(classes)} classes, numbered from 0; give a list that counts so"
        )
    log.info("%s: its labels 0 … %d are taken as positions of the %d classes by name", labels.path, highest, len(classes))
    named = {name: classes[int(label)] for name, label in labels.labels.items()}
    return LabelList(path=labels.path, labels=named, classes=tuple(classes), num_skipped=labels.num_skipped)


def base_folder(labels: LabelList, candidates: Sequence[Path]) -> Path:
    """The folder below which most of a sample of the listed files is there. DataError if none is in any."""
    sample = list(islice(labels.labels, 0, None, max(1, len(labels.labels) // 50)))
    candidates = [*candidates, Path("/")]  # some lists have absolute paths
    found = {folder: sum((folder / name).is_file() for name in sample) for folder in dict.fromkeys(candidates)}
    best = max(found, key=found.__getitem__)
    if not found[best]:
        tried = ", ".join(map(str, list(found)[:-1][:3]))
        raise DataError(f"{labels.path}: its files, for example {sample[0]}, are not below {tried}; name their folder with --images")
    return best


def require_present(labels: LabelList, missing: Sequence[str], *, where: Path) -> None:
    """Warn of listed files that are not there; DataError if these are more than a small share."""
    if len(missing) > MAX_MISSING * len(labels.labels):
        raise DataError(
            f"{labels.path}: {len(missing)} of its {len(labels.labels)} images are not in {where}, for example {missing[0]}; complete the "
            "data, or give the list that belongs to it"
        )
    warn(labels.path, {f"listed images are not in {where}": missing})


def warn(path: Path, skipped: Mapping[str, Sequence[str]]) -> None:
    """Log what is skipped, with its number and a few names."""
    for what, names in skipped.items():
        if names:
            log.warning(
                "%s: %d %s: skipped (%s%s)", path, len(names), what, ", ".join(names[:_NAMED]), ", …" if len(names) > _NAMED else ""
            )
