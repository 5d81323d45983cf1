"""A handful of photographs as an image source, tables as mining would make them, and plans of the methods' views."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from orl_fast.config import Config, ViewsConfig
from orl_fast.methods import BYOL, ORL
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views import ViewPlan, ViewSpec
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined, draw_plan
from orl_fast.views.plan import Rows

NOTHING = {
    "image_size_px": 112, "flip_prob": 0.0, "jitter_prob": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0,
    "hue": 0.0, "grayscale_prob": 0.0, "blur_prob": (0.0, 0.0), "solarize_prob": (0.0, 0.0),
}  # fmt: skip


def only(**changes: object) -> ViewsConfig:
    """Random crops, and of all augmentations only those named."""
    return ViewsConfig(**{**NOTHING, **changes})  # type: ignore[arg-type]


@dataclass
class Photos:
    """Encoded images in memory."""

    data: list[NDArray[np.uint8]]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]

    def views(self, rows: Rows, /) -> list[NDArray[np.uint8]]:
        return [self.data[row] for row in rows]

    def close(self) -> None:
        """Nothing is held."""

    def __len__(self) -> int:
        return len(self.data)


def specs_of(views: ViewsConfig, *names: str) -> tuple[ViewSpec, ...]:
    """ORL's views of these names; without names all six."""
    specs = {spec.name: spec for spec in ORL.views(Config(views=views))}
    return tuple(specs[name] for name in names or specs)


def byol_plan(rows: Rows, photos: Photos, views: ViewsConfig, *, seed: int = 0, epoch: int = 0) -> ViewPlan:
    specs = BYOL.views(Config(views=views))
    return draw_plan(rows, specs, seed=seed, epoch=epoch, heights=photos.heights, widths=photos.widths)


def orl_plan(rows: Rows, photos: Photos, mined: Mined, views: ViewsConfig, *names: str, seed: int = 0, epoch: int = 0) -> ViewPlan:
    """With the views of these names only, if any are given."""
    sizes = {"heights": photos.heights, "widths": photos.widths}
    return draw_plan(rows, specs_of(views, *names), seed=seed, epoch=epoch, mined=mined, **sizes)


@pytest.fixture(scope="session")
def photos(photo_paths: list[Path]) -> Photos:
    """24 photographs, grayscale and upright ones among them."""
    sizes, modes = {}, {}
    for path in photo_paths:
        with Image.open(path) as image:
            sizes[path], modes[path] = image.size, image.mode
    gray = [path for path in photo_paths if modes[path] == "L"][:2]
    upright = [path for path in photo_paths if sizes[path][1] > sizes[path][0] and path not in gray][:6]
    assert gray
    assert upright
    chosen = gray + upright + [path for path in photo_paths if path not in gray + upright]
    chosen = chosen[:24]
    heights, widths = (np.array([sizes[path][axis] for path in chosen], np.int32) for axis in (1, 0))
    return Photos([np.fromfile(path, np.uint8) for path in chosen], heights, widths)


@pytest.fixture(scope="session")
def mined(photos: Photos) -> Mined:
    """RoIs and pairs at random: 1 to 6 RoIs, 3 neighbors, 1 to 3 pairs each."""
    rng, num = np.random.default_rng(7), len(photos)
    lists = []
    for height, width in zip(photos.heights, photos.widths, strict=True):
        count = int(rng.integers(1, 7))
        sides = rng.integers(60, 180, (count, 2))
        corner = (rng.random((count, 2)) * (np.array([width, height]) - sides)).astype(np.int64)
        lists.append(np.concatenate([corner, corner + sides], axis=1).astype(np.int16))
    rois = BoxTable.from_lists(lists)
    neighbors = np.stack([rng.permutation(np.delete(np.arange(num), i))[:3] for i in range(num)])
    count = rng.integers(1, 4, (num, 3)).astype(np.int32)
    first = np.concatenate([[0], np.cumsum(count)[:-1]]).reshape(num, 3)
    own = np.repeat(np.arange(num), count.sum(axis=1))
    partner = np.repeat(neighbors.ravel(), count.ravel())
    pairs = PairTable(
        neighbors=neighbors,
        first=first,
        count=count,
        query_roi=(rng.random(len(own)) * rois.counts[own]).astype(np.int16),
        partner_roi=(rng.random(len(own)) * rois.counts[partner]).astype(np.int16),
        similarities=np.zeros(len(own), np.float32),
    )
    return Mined(rois=rois, pairs=pairs)


@pytest.fixture(scope="session")
def cpu(photos: Photos) -> Iterator[CpuRenderer]:
    with closing(CpuRenderer(photos, num_threads=2)) as renderer:
        yield renderer
