"""Where partner patches are read from: each RoI that some pair uses, stored once as a small JPEG (written by `orl_fast.mining.patches`)."""

import mmap
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError, StaleError
from orl_fast.tables import open_array, open_info
from orl_fast.views.plan import PATCH_SIDE_PX
from orl_fast.views.renderer import ImageSource

_REMEDY = "orl-fast mine patches"
_MAX_OPEN_MAPS = 128  # each holds a file descriptor


class PatchStore:
    """Patches by number, from a table folder with patches-000000.tar, … beside its arrays.

    Attributes:
        rows: [P] int64, sorted: patch p shows the RoI rois.boxes[rows[p]].
    """

    def __init__(self, folder: Path) -> None:
        self.rows: NDArray[np.int64] = open_array(folder, "roi_row")
        self._shard, self._offset, self._size = (open_array(folder, name) for name in ("shard", "offset", "size"))
        self._folder = folder
        self._map = lru_cache(_MAX_OPEN_MAPS)(partial(_map_shard, folder))  # a map in use lives on in its views

    @classmethod
    def open(cls, folder: Path, *, made_from: Mapping[str, str]) -> "PatchStore":
        """Open the store and check what it was made from.

        Raises:
            MissingStageError: there is none. StaleError: made from other tables. DataError: damaged, or patches of another size.
        """
        info = open_info(folder, "patches", made_from=made_from, remedy=_REMEDY)
        if info.settings.get("side_px") != PATCH_SIDE_PX:
            raise StaleError(f"{folder}: patches of {info.settings.get('side_px')} px, {PATCH_SIDE_PX} px are read; run {_REMEDY}")
        return cls(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, i: int, /) -> NDArray[np.uint8]:
        """The bytes of patch `i`, without a copy."""
        mapped = self._map(int(self._shard[i]))
        try:
            return np.frombuffer(mapped, np.uint8, int(self._size[i]), int(self._offset[i]))
        except ValueError as error:
            raise DataError(f"{self._folder}: patch {i} lies beyond the end of its tar; remove the folder and run {_REMEDY}") from error


def _map_shard(folder: Path, shard: int) -> mmap.mmap:
    path = folder / f"patches-{shard:06d}.tar"
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove {folder} and run {_REMEDY}") from error


class PatchedSource:
    """Images by row, and beyond the last row the stored patches (see `Crops.source`)."""

    def __init__(self, images: ImageSource, patches: PatchStore, *, num_images: int) -> None:
        self._images, self._patches, self._num_images = images, patches, num_images

    def view(self, i: int, /) -> NDArray[np.uint8]:
        return self._images.view(i) if i < self._num_images else self._patches.view(i - self._num_images)
