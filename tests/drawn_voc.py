"""A small data set in PASCAL VOC's layout, drawn: some images show a disk, a box or both, on noise."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("box", "disk")
Labels = dict[str, dict[str, int]]  # image → class → 1, 0 or -1


def drawn_labels(split: str, num: int) -> Labels:
    """Names as in VOC2007, every tenth image difficult for "box"."""
    first = {"trainval": 0, "test": 5000}[split]
    return {f"{first + i:06d}": {"box": 0 if i % 10 == 4 else 1 if i % 3 == 0 else -1, "disk": 1 if i % 4 < 2 else -1} for i in range(num)}


def write_class_files(folder: Path, split: str, labels: Labels) -> None:
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in labels))
    for each in CLASSES:
        (main / f"{each}_{split}.txt").write_text("".join(f"{name} {of[each]:2d}\n" for name, of in labels.items()))


def write_annotations(folder: Path, split: str, labels: Labels) -> None:
    """XML files: an image that is difficult for a class has only difficult objects of it, one that shows it has one of them as well."""
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    (folder / "Annotations").mkdir(exist_ok=True)
    (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in labels))
    for name, of in labels.items():
        flags = {1: (1, 0), 0: (1, 1), -1: ()}
        objects = [
            f"<object><name>{each}</name><difficult>{flag}</difficult><part><name>edge</name></part></object>"
            for each, label in of.items() for flag in flags[label]
        ]  # fmt: skip
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation><folder>VOC2007</folder>{''.join(objects)}</annotation>")


def draw_images(folder: Path, labels: Mapping[str, Mapping[str, int]]) -> None:
    (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for name, of in labels.items():
        rng = np.random.default_rng(int(name))
        image = Image.fromarray(rng.integers(60, 200, (60, 80, 3), np.uint8))
        draw = ImageDraw.Draw(image)
        x, y = rng.integers(5, 25, 2).tolist()
        if of["disk"] >= 0:
            draw.ellipse((x, y, x + 25, y + 25), fill=(230, 20, 20))
        if of["box"] >= 0:
            draw.rectangle((x + 25, y, x + 45, y + 30), fill=(20, 20, 230))
        image.save(folder / "JPEGImages" / f"{name}.jpg", quality=90)


def draw_voc(folder: Path, *, num_trainval: int = 24, num_test: int = 16) -> Path:
    """VOC2007 below the folder, with class files."""
    root = folder / "VOCdevkit" / "VOC2007"
    for split, num in (("trainval", num_trainval), ("test", num_test)):
        labels = drawn_labels(split, num)
        write_class_files(root, split, labels)
        draw_images(root, labels)
    return root
