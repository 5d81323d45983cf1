"""Pictures drawn from a seed, and their files."""

import io

import numpy as np
from PIL import Image


def draw_image(seed: int, *, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth color noise, which JPEG renders closely."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()
