"""Folders of drawn images, plain and packed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from odd_images import draw_image, encoded
from PIL import Image

from orl_fast.shards import write_shards


@pytest.fixture
def draw() -> Callable[..., Image.Image]:
    return draw_image


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A nested folder of 23 JPEGs of different sizes."""
    folder = tmp_path / "photos"
    for i in range(23):
        path = folder / f"dir{i % 3}" / f"image {i:02d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(draw_image(i, width=20 + i, height=50 - i)))
    return folder


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Path:
    """The photos in shards of 5."""
    write_shards([photos], tmp_path / "packed", shard_size=5, num_workers=1)
    return tmp_path / "packed"
