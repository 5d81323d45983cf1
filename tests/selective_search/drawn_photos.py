"""Drawn pictures that segment like photographs."""

import io

import numpy as np
from PIL import Image

from benchmarks.photographs import draw_jpeg


def draw_photo(seed: int, *, width: int = 320, height: int = 240) -> np.ndarray:
    """[H, W, 3] uint8 RGB."""
    with Image.open(io.BytesIO(draw_jpeg(seed, width_px=width, height_px=height))) as image:
        return np.array(image)
