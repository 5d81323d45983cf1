"""Miniature data sets in the layouts of the real ones, drawn in seconds: to rehearse the paper's experiments, not to learn from.

Each class is a shape in a color, on a gray ground; image i of a data set is a pure function of (seed, i).
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from orl_fast.files import atomic_folder

_COLORS = ("#d03030", "#3060d0", "#30a040", "#d0a020", "#9040b0", "#20a0a0")
_CORNERS = (3, 4, 24)  # a triangle, a square, nearly a circle
_SIZE_PX = (160, 120)  # width and height of images that are wider than high
_Polygon = list[tuple[float, float]]


def draw_layouts(root: Path, *, num_images: int = 48, num_classes: int = 4, seed: int = 0) -> dict[str, Path]:
    """Draw all data sets below `root`, each only if it is not there yet; returns their folders by name.

    "coco", "voc", "imagenet" (with "1percent.txt" and "10percent.txt" in "lists"), "places" and "inat", each with about `num_images` images
    to learn from and half as many to test on.
    """
    draw: dict[str, Callable[..., None]] = {"coco": _coco, "voc": _voc, "imagenet": _imagenet, "places": _places, "inat": _inat}
    for number, (name, function) in enumerate(draw.items()):
        if not (root / name).is_dir():
            with atomic_folder(root / name) as folder:
                function(folder, np.random.default_rng((seed, number)), num_images, num_classes)
    return {name: root / name for name in draw} | {"lists": root / "imagenet" / "lists"}


def _coco(folder: Path, rng: np.random.Generator, num_images: int, num_classes: int) -> None:
    """train2017/ and val2017/, with polygons, a crowd and an image without objects."""
    for split, count in (("train2017", num_images), ("val2017", num_images // 2)):
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for i in range(count):
            labels = rng.integers(0, num_classes, 0 if i == 1 else rng.integers(1, 4))
            image, polygons = _scene(rng, labels.tolist())
            name = f"{i:012d}.jpg"
            _save(image, folder / split / name)
            images.append({"id": i + 1, "file_name": name, "width": image.width, "height": image.height})
            for label, polygon in zip(labels.tolist(), polygons, strict=True):
                x, y, right, bottom = _bounds(polygon)
                flat = [round(value, 2) for point in polygon for value in point]
                objects.append({
                    "id": len(objects) + 1, "image_id": i + 1, "category_id": 10 * label + 1, "bbox": [x, y, right - x, bottom - y],
                    "area": _area(polygon), "segmentation": [flat], "iscrowd": 0,
                })  # fmt: skip
        width, height = images[0]["width"], images[0]["height"]
        crowd = {"size": [height, width], "counts": [0, width * height]}  # the whole image
        objects.append({
            "id": len(objects) + 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height], "area": width * height,
            "segmentation": crowd, "iscrowd": 1,
        })  # fmt: skip
        categories = [{"id": 10 * label + 1, "name": _class(label)} for label in range(num_classes)]
        _write(folder / "annotations" / f"instances_{split}.json", {"images": images, "annotations": objects, "categories": categories})


def _voc(folder: Path, rng: np.random.Generator, num_images: int, num_classes: int) -> None:
    """VOCdevkit/VOC2007 with the lists of each class, difficult objects included, and an annotation file for each image."""
    root = folder / "VOCdevkit" / "VOC2007"
    numbers: dict[str, list[str]] = {}
    lists: dict[tuple[int, str], list[str]] = {}
    for split, count in (("trainval", num_images), ("test", num_images // 2)):
        for i in range(count):
            labels = rng.integers(0, num_classes, rng.integers(1, 4)).tolist()
            difficult = rng.random(len(labels)) < 0.1
            image, polygons = _scene(rng, labels)
            number = f"{i if split == 'trainval' else num_images + i:06d}"
            _save(image, root / "JPEGImages" / f"{number}.jpg")
            numbers.setdefault(split, []).append(number)
            entry = ElementTree.Element("annotation")
            ElementTree.SubElement(entry, "filename").text = f"{number}.jpg"
            for label, polygon, hard in zip(labels, polygons, difficult.tolist(), strict=True):
                item = ElementTree.SubElement(entry, "object")
                ElementTree.SubElement(item, "name").text = _class(label)
                ElementTree.SubElement(item, "difficult").text = str(int(hard))
                box = ElementTree.SubElement(item, "bndbox")
                for name, value in zip(("xmin", "ymin", "xmax", "ymax"), _bounds(polygon), strict=True):
                    ElementTree.SubElement(box, name).text = str(round(value) + 1)
            _text(root / "Annotations" / f"{number}.xml", ElementTree.tostring(entry, encoding="unicode"))
            for label in range(num_classes):
                own = [hard for other, hard in zip(labels, difficult.tolist(), strict=True) if other == label]
                lists.setdefault((label, split), []).append(f"{number} {'-1' if not own else ' 0' if all(own) else ' 1'}")
    for split, names in numbers.items():
        _text(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(names) + "\n")
    for (label, split), lines in lists.items():
        _text(root / "ImageSets" / "Main" / f"{_class(label)}_{split}.txt", "\n".join(lines) + "\n")


def _imagenet(folder: Path, rng: np.random.Generator, num_images: int, num_classes: int) -> None:
    """train/ and val/ with a folder for each class, and SimCLR's lists."""
    names = []
    for split, count in (("train", num_images), ("val", num_images // 2)):
        for i in range(count):
            label = i % num_classes
            name = f"n{label:08d}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{i:08d}.JPEG"
            _save(_scene(rng, [label])[0], folder / split / f"n{label:08d}" / name)
            names += [name] if split == "train" else []
    for percent, count in ((1, num_classes), (10, num_images // 2)):  # of so few images a hundredth would be none
        _text(folder / "lists" / f"{percent}percent.txt", "".join(f"{name}\n" for name in sorted(names[:count])))


def _places(folder: Path, rng: np.random.Generator, num_images: int, num_classes: int) -> None:
    """Images by letter and scene, and the lists train_places205.csv and val_places205.csv."""
    for split, count in (("train", num_images), ("val", num_images // 2)):
        lines = []
        for i in range(count):
            label = i % num_classes
            name = f"{_class(label)[0]}/{_class(label)}/{split}_{i:08d}.jpg"
            _save(_scene(rng, [label])[0], folder / "images" / name)
            lines.append(f"{name} {label}\n")
        _text(folder / f"{split}_places205.csv", "".join(lines))


def _inat(folder: Path, rng: np.random.Generator, num_images: int, num_classes: int) -> None:
    """train_val2018/ by kingdom and species, train2018.json and val2018.json."""
    for split, count in (("train", num_images), ("val", num_images // 2)):
        images, objects = [], []
        for i in range(count):
            label, name = i % num_classes, f"train_val2018/Aves/{i % num_classes}/{split}{i:06d}.jpg"
            image, _ = _scene(rng, [label])
            _save(image, folder / name)
            images.append({"id": i, "file_name": name, "width": image.width, "height": image.height})
            objects.append({"id": i, "image_id": i, "category_id": label})
        categories = [{"id": label, "name": str(label), "supercategory": "Aves"} for label in range(num_classes)]
        _write(folder / f"{split}2018.json", {"images": images, "annotations": objects, "categories": categories})


def _class(label: int) -> str:
    return f"{('triangle', 'square', 'disk')[label % 3]}{label}"


def _scene(rng: np.random.Generator, labels: Sequence[int]) -> tuple[Image.Image, list[_Polygon]]:
    """An image with one object of each of these classes, and their outlines; one in four stands upright."""
    width, height = _SIZE_PX if rng.random() < 0.75 else _SIZE_PX[::-1]
    ground = rng.integers(90, 150, (height // 8, width // 8, 3), np.uint8)
    image = Image.fromarray(ground).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    polygons = []
    for label in labels:
        radius = rng.uniform(16, 40)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        corners, turn = _CORNERS[label % len(_CORNERS)], rng.uniform(0, 2 * math.pi)
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        polygon = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
        draw.polygon(polygon, fill=_COLORS[label % len(_COLORS)], outline="#202020")
        polygons.append(polygon)
    return image, polygons


def _bounds(polygon: _Polygon) -> tuple[float, float, float, float]:
    x, y = zip(*polygon, strict=True)
    return round(min(x), 2), round(min(y), 2), round(max(x), 2), round(max(y), 2)


def _area(polygon: _Polygon) -> float:
    following = [*polygon[1:], polygon[0]]
    return round(abs(sum(x * v - u * y for (x, y), (u, v) in zip(polygon, following, strict=True))) / 2, 2)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=90)


def _write(path: Path, content: Any) -> None:
    _text(path, json.dumps(content))


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
