"""Drawn pictures that segment like photographs."""

import io

import numpy as np
from PIL import Image

from benchmarks.photographs import draw_jpeg


def draw_photo(seed: int, *, width: int = 320, height: int = 240) -> np.ndarray:
    """[H, W, 3] uint8 RGB."""
    with Image.open(io.BytesIO(draw_jpeg(seed, width_px=width, height_px=height))) as image:
        return np.array(image)


def draw_flat(kind: str, *, width: int = 160, height: int = 120) -> np.ndarray:
    """[H, W, 3] uint8 without noise, where many edges weigh the same: "ramp" or "steep ramp", "checks", "cells", "shapes" or "poster"."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width]
    palette = rng.integers(0, 256, (6, 3), dtype=np.uint8)
    if kind == "poster":
        return draw_photo(3, width=width, height=height) // 64 * 64
    if kind == "cells":
        return palette[rng.integers(0, 6, (height // 5 + 1, width // 5 + 1))][y // 5, x // 5]
    if kind == "shapes":
        image = np.full((height, width, 3), 91, np.uint8)
        for _ in range(40):
            cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 25)
            image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = palette[rng.integers(6)]
        return image
    gray = {"ramp": np.rint(x * 255 / (width - 1)), "steep ramp": np.rint(y * 255 / (height - 1)), "checks": (x // 13 + y // 13) % 2 * 255}
    return np.repeat(gray[kind].astype(np.uint8)[..., None], 3, axis=2)
