"""Where partner patches are read from: each RoI that some pair uses, stored once as a small JPEG (written by `orl_fast.mining.pairs`)."""

import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError, StaleError
from orl_fast.tables import open_array, open_info
from orl_fast.views.plan import AnyImage, ImageSource, ReadsAhead, Rows, ViewPlan

PATCH_SIDE_PX = 128
_REMEDY = "orl-fast mine patches"
_MAX_OPEN_MAPS = 1024  # each holds a file descriptor


class PatchStore:
    """Patches by number, from a table folder with patches-000000.tar, … next to its arrays.

    The folder is held by its descriptor: a training keeps reading the patches it started with, even if others are packed meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptor = folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._descriptor)
        self.rows: Rows = open_array(folder, "roi_row")  # [P] sorted: patch p shows the RoI rois.boxes[rows[p]]
        self._shard, self._offset, self._size = (open_array(folder, name) for name in ("shard", "offset", "size"))
        self._map = lru_cache(_MAX_OPEN_MAPS)(self._mapped)  # a map in use lives on in its views

    @classmethod
    def open(cls, folder: Path, *, made_from: Mapping[str, str]) -> "PatchStore":
        """MissingStageError: there is none. StaleError: made from other tables, or patches of another size. DataError: damaged."""
        info = open_info(folder, "patches", made_from=made_from, remedy=_REMEDY)
        if info.settings.get("side_px") != PATCH_SIDE_PX:
            raise StaleError(f"{folder}: patches of {info.settings.get('side_px')} px, {PATCH_SIDE_PX} px are read; run {_REMEDY}")
        return cls(folder)

    def view(self, i: int, /) -> NDArray[np.uint8]:
        """The bytes of patch `i`, without a copy. DataError: its tar is missing or cut short."""
        mapped = self._map(int(self._shard[i]))
        try:
            return np.frombuffer(mapped, np.uint8, int(self._size[i]), int(self._offset[i]))
        except ValueError as error:
            raise DataError(f"{self._folder}: patch {i} lies beyond the end of its tar; remove the folder and run {_REMEDY}") from error

    def _mapped(self, shard: int) -> mmap.mmap:
        name = f"patches-{shard:06d}.tar"
        try:
            with open(os.open(name, os.O_RDONLY, dir_fd=self._descriptor), "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self._folder / name}: cannot be read ({error}); remove {self._folder} and run {_REMEDY}") from error


class PatchedSource:
    """Images by row, and beyond the last row the stored patches (see `Crops.source`)."""

    def __init__(self, images: ImageSource, patches: PatchStore, *, num_images: int) -> None:
        self._images, self._patches, self._num_images = images, patches, num_images

    def views(self, rows: Rows, /) -> list[AnyImage]:
        rows = np.asarray(rows)
        stored = rows >= self._num_images
        images: Iterator[AnyImage] = iter(self._images.views(rows[~stored]))
        patches: Iterator[AnyImage] = (self._patches.view(int(row)) for row in rows[stored] - self._num_images)
        return [next(patches if is_patch else images) for is_patch in stored.tolist()]

    def announce(self, plan: ViewPlan, /) -> None:
        if isinstance(self._images, ReadsAhead):
            self._images.announce(plan)

    def close(self) -> None:
        self._images.close()
