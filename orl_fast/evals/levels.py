"""Pooled feature levels of whole images, kept in a folder under a fingerprint of the encoder, the files and the size of the views."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from orl_fast.config import digest
from orl_fast.console import log, progress
from orl_fast.encode import encode
from orl_fast.evals import Context
from orl_fast.evals.pooling import pool_levels
from orl_fast.files import atomic_folder, human_bytes, require_free_space, write_json
from orl_fast.models import Encoder
from orl_fast.shards.images import BadImage, upright_rgb
from orl_fast.views.plan import Batch, Rows, ViewPlan, roi_crops

RESIZE_SHARE = 256 / 224  # of the side of the views: the shorter side after the first of two resizes
_IMAGES_PER_BATCH = 64
_INDEX = "index.json"
_FORMAT = 1  # of a folder, and of how views are made; part of the fingerprint


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Features of images, one array per level, mapped from files."""

    values: tuple[NDArray[np.float32], ...]  # each [N, D]; D differs
    kept: NDArray[np.bool_]  # [number of paths] whether an image could be read; N of them
    fingerprint: str


def encode_levels(encoder: Encoder, paths: Sequence[Path], *, size_px: int, folder: Path, context: Context) -> Levels:
    """The levels of each image, from `folder` if they were kept there, whole and undamaged; else computed and kept.

    Images are resized to a shorter side of 8/7 of `size_px`, then to `size_px` squared, without a crop: bit for bit as torchvision does it
    on PIL images. Those that cannot be read are skipped, counted and logged; where that was a failure to read, not to decode, the next
    call tries again.

    ConfigError: the backbone takes no views of that size; DataError: the disk is full, or features are not finite.
    """
    encoder.backbone.require_size(size_px, setting="side of the views (--size)")
    stats = [path.stat() for path in paths]
    files = [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]
    fingerprint = digest([_FORMAT, encoder.name, encoder.fingerprint, size_px, files])
    place = folder / f"features-{fingerprint}"
    found = _opened(place, fingerprint, len(paths))
    if found is not None:
        log.info("%s: features of %d images, computed before", place, int(found.kept.sum()))
        return found
    _compute(encoder, paths, place, size_px=size_px, context=context)
    found = _opened(place, fingerprint, len(paths), transient=True)
    assert found is not None
    return found


def _opened(place: Path, fingerprint: str, num_paths: int, *, transient: bool = False) -> Levels | None:
    """What is kept; None if nothing is, if it is damaged, or if (unless `transient`) an image should be tried again."""
    try:
        index = json.loads((place / _INDEX).read_bytes())
        kept = np.ones(num_paths, np.bool_)
        kept[index["skipped"]] = False
        values = []
        for level, checksum in enumerate(index["checksums"], start=1):
            values.append(np.load(place / f"level{level}.npy", mmap_mode="r")[: kept.sum()])
            if zlib.crc32(values[-1].data) != checksum:
                raise ValueError(f"level{level}.npy has another checksum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s: damaged (%s); features are computed again", place, error)
        return None
    return Levels(values=tuple(values), kept=kept, fingerprint=fingerprint) if transient or not index["try_again"] else None


def _compute(encoder: Encoder, paths: Sequence[Path], place: Path, *, size_px: int, context: Context) -> None:
    def forward(images: torch.Tensor) -> torch.Tensor:
        return torch.cat(pool_levels(encoder.levels(images)), dim=1)

    encoder = encoder.to(context.device)
    with torch.inference_mode():
        sides = [level.shape[1] for level in pool_levels(encoder.levels(torch.zeros(1, 3, size_px, size_px, device=context.device)))]
    num_bytes = 4 * len(paths) * sum(sides)
    require_free_space(place, num_bytes=num_bytes, purpose=f"features of {len(paths)} images")
    shutil.rmtree(place, ignore_errors=True)
    with (
        atomic_folder(place) as folder,
        closing(_Squares(paths, size_px=size_px, num_threads=context.num_threads)) as squares,
        progress("encoding", total=len(paths), unit="images") as advance,
    ):
        arrays = [
            np.lib.format.open_memmap(folder / f"level{i}.npy", mode="w+", dtype=np.float32, shape=(len(paths), side))
            for i, side in enumerate(sides, start=1)
        ]

        def plans() -> Iterator[tuple[None, ViewPlan]]:
            for start in range(0, len(paths), _IMAGES_PER_BATCH):
                rows = np.arange(start, min(start + _IMAGES_PER_BATCH, len(paths)))
                yield None, roi_crops(rows, np.zeros((len(rows), 4), np.float32), size_px=size_px)  # drawn whole, whatever the boxes
                advance(len(rows))

        for file in folder.iterdir():
            _allocate(file)
        done = 0
        for _, batch in encode(forward, squares, plans(), batch_size=_IMAGES_PER_BATCH, device=context.device, skip=squares.skip):
            for array, values in zip(arrays, np.split(batch, np.cumsum(sides)[:-1], axis=1), strict=True):
                array[done : done + len(batch)] = values
            done += len(batch)
        for array in arrays:
            array.flush()
        checksums = [zlib.crc32(array[:done].data) for array in arrays]
        write_json(folder / _INDEX, {"skipped": sorted(squares.reasons), "try_again": squares.try_again, "checksums": checksums})
    log.info("%s: features of %d images are kept there (%s)", place, done, human_bytes(num_bytes))


def _allocate(file: Path) -> None:
    """Take the room of a file on the disk now: a full disk is an error here, and a crash when mapped pages are written."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


class _Squares:
    """A renderer (see `Renderer`) of whole images as squares. PIL decodes and resizes them in threads: what is checked is decoded once."""

    def __init__(self, paths: Sequence[Path], *, size_px: int, num_threads: int) -> None:
        self._paths, self._size_px = paths, size_px
        self._pool = ThreadPoolExecutor(num_threads)
        self.reasons: dict[int, str] = {}  # why images were skipped
        self.try_again = False  # whether one of them could not be read, which may pass

    def render(self, plan: ViewPlan) -> Batch:
        squares = list(self._pool.map(self._square, plan.rows.tolist()))
        good = np.array([square is not None for square in squares])
        pixels = (
            np.stack([square for square in squares if square is not None])
            if good.any()
            else np.empty((0, *[self._size_px] * 2, 3), np.uint8)
        )
        views = {name: torch.from_numpy(pixels).permute(0, 3, 1, 2) for name in plan.sizes_px}
        return Batch(views=views, rows=plan.rows[good], bad_rows=plan.rows[~good], bad_sources=plan.rows[~good])

    def skip(self, rows: Rows) -> None:
        for row in rows.tolist():
            log.warning("%s: skipped, %s", self._paths[row], self.reasons[row])

    def close(self) -> None:
        self._pool.shutdown()

    def _square(self, row: int) -> NDArray[np.uint8] | None:
        try:
            return twice_resized(upright_rgb(self._paths[row].read_bytes()), self._size_px)
        except BadImage as error:
            self.reasons[row] = str(error)
        except OSError as error:
            self.reasons[row], self.try_again = f"cannot be read ({error.strerror})", True
        return None


def twice_resized(image: Image.Image, size_px: int) -> NDArray[np.uint8]:
    """[size_px, size_px, 3]: the shorter side resized to 8/7 of that, then both sides to it (OpenSelfSup's views for VOC07)."""
    shorter = round(size_px * RESIZE_SHARE)
    width, height = (max(1, shorter * side // min(image.size)) for side in image.size)
    first = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(first.resize((size_px, size_px), Image.Resampling.BILINEAR))
