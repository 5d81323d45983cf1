"""The photographs that benchmarks run on: a folder's, a packed folder's, or drawn ones where there is none at hand."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orl_fast.errors import DataError
from orl_fast.shards import ShardIndex, ShardReader

_SUFFIXES = {".jpg", ".jpeg"}


def load_jpegs(source: Path | None, *, limit: int) -> list[bytes]:
    """JPEG files' bytes, at most `limit`, in a fixed order.

    Args:
        source: a folder of photographs (nested), a packed folder, or None: 640 × 480 pictures drawn from a fixed seed.
    Raises:
        DataError: the folder holds no JPEG.
    """
    if source is None:
        return [draw_jpeg(seed) for seed in range(min(limit, 64))]
    if (source / "manifest.json").is_file():
        with ShardReader(ShardIndex.open(source)) as reader:
            return [reader.read(i) for i in range(min(limit, len(reader.index)))]
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES)[:limit]
    if not paths:
        raise DataError(f"{source}: no .jpg files below it; name a folder of photographs")
    return [path.read_bytes() for path in paths]


def draw_jpeg(seed: int, *, width_px: int = 640, height_px: int = 480) -> bytes:
    """A picture of overlapping textured shapes; decodes and segments at about the cost of a photograph (about 150 kB)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height_px, :width_px].astype(np.float32)
    image = _texture(rng, height_px, width_px, scale=48) * 0.6 + 60
    for _ in range(14):
        cx, cy = rng.uniform(0, width_px), rng.uniform(0, height_px)
        rx, ry = rng.uniform(30, 160, 2)
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        if rng.random() < 0.5:
            inside = (abs(x - cx) < rx) & (abs(y - cy) < ry)
        image[inside] = (rng.uniform(20, 235, 3) + _texture(rng, height_px, width_px, scale=12) * 0.35 - 40)[inside]
    image += rng.normal(0, 6, image.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _texture(rng: np.random.Generator, height: int, width: int, *, scale: int) -> NDArray[np.float32]:
    """[H, W, 3] smooth noise, 0 to 255."""
    coarse = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
