"""Drawn scenes with COCO's annotations: a few rectangles and ellipses, each kind in its own color, on noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE_PX = 64
CATEGORIES = [{"id": 3, "name": "box"}, {"id": 7, "name": "disk"}]
_COLORS = ((220, 60, 40), (40, 90, 220))


def draw_scene(path: Path, seed: int, *, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX), num_objects: int = 2) -> list[dict[str, Any]]:
    """Write an image; returns its objects without ids. Objects do not overlap: each has its own part of the image's width."""
    rng = np.random.default_rng(seed)
    width, height = size_px
    image = Image.fromarray(rng.integers(90, 150, (height, width, 3), np.uint8))
    pen, objects = ImageDraw.Draw(image), []
    for i in range(num_objects):
        kind = int(rng.integers(2))
        part = width / num_objects
        w, h = rng.uniform(0.5, 0.9) * part, rng.uniform(0.3, 0.7) * height
        x, y = i * part + rng.uniform(0, part - w), rng.uniform(0, height - h)
        x, y, w, h = (float(round(value)) for value in (x, y, w, h))
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        if kind == 0:
            outline = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        else:
            outline = [(x + w / 2 * (1 + np.cos(a)), y + h / 2 * (1 + np.sin(a))) for a in angles]
        pen.polygon(outline, fill=_COLORS[kind])
        polygon = [float(value) for point in outline for value in point]
        area = w * h * (1 if kind == 0 else np.pi / 4)
        known = {"category_id": CATEGORIES[kind]["id"], "bbox": [x, y, w, h], "area": area, "iscrowd": 0, "segmentation": [polygon]}
        objects.append(known)
    image.save(path, quality=95)
    return objects


def draw_split(root: Path, name: str, *, seeds: range, **how: Any) -> dict[str, Any]:
    """Images and annotations of a split in COCO's layout; returns the annotations, which `write_split` writes again after a change."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    width, height = how.get("size_px", (SIDE_PX, SIDE_PX))
    for seed in seeds:
        path = folder / f"{seed:06d}.jpg"
        images.append({"id": 10 + seed, "file_name": path.name, "width": width, "height": height})
        for known in draw_scene(path, seed, **how):
            objects.append({"id": len(objects) + 1, "image_id": 10 + seed, **known})
    content = {"images": images, "annotations": objects, "categories": CATEGORIES}
    write_split(root, name, content)
    return content


def write_split(root: Path, name: str, content: Any) -> Path:
    file = root / "annotations" / f"instances_{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file
