"""Images whose pixels are stored are not decoded (see `orl_fast.shards.pixels`), as far as that is faster here."""

import logging
import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

from orl_fast.config import LoaderConfig
from orl_fast.console import log
from orl_fast.cores import num_cores
from orl_fast.files import human_bytes
from orl_fast.memory import available_memory
from orl_fast.shards.decode import Decoder
from orl_fast.shards.index import ShardIndex
from orl_fast.shards.pixels import Decoded, PixelStore
from orl_fast.shards.reader import advise
from orl_fast.views.plan import AnyImage, ImageSource, Rows, ViewPlan, needed_regions

_SHARE = 0.8  # of the available memory that is counted on for pixels
_TRIAL_IMAGES, _TRIAL_READERS = 24, 8
_ANNOUNCED_AFTER_A_WAIT = 64


class PixelSource:
    """The images of the first rows as stored pixels, the others as another source has them."""

    def __init__(self, images: ImageSource, pixels: PixelStore, *, num_rows: int) -> None:
        self._images, self._pixels, self.num_rows = images, pixels, num_rows
        self._waits = self._announcing = 0

    def views(self, rows: Rows, /) -> list[AnyImage]:
        rows = np.asarray(rows)
        stored = rows < self.num_rows
        encoded = iter(self._images.views(rows[~stored]))
        return [self._pixels.decoded(row) if there else next(encoded) for row, there in zip(rows.tolist(), stored.tolist(), strict=True)]

    def announce(self, plan: ViewPlan, /) -> None:
        """Have the system read ahead what a plan needs: of each image the lines of its crops.

        Asking costs 10 to 20 microseconds an image even if all is in memory, so it is asked only for a while after the disk was waited for.
        """
        waits = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        self._announcing = _ANNOUNCED_AFTER_A_WAIT if waits != self._waits else self._announcing - 1
        self._waits = waits
        if self._announcing <= 0:
            return
        sources, places = np.unique(plan.crops.source, return_inverse=True)
        for row, (_, top, _, bottom) in zip(sources.tolist(), needed_regions(plan, places, len(sources)).tolist(), strict=True):
            if row < self.num_rows:
                advise(self._pixels.decoded(row).lines(top, bottom), now=False)

    def close(self) -> None:
        self._pixels.close()
        self._images.close()


def with_pixels(images: ImageSource, index: ShardIndex, loader: LoaderConfig, *, shrunken: bool) -> ImageSource:
    """`images`, or a source that takes stored pixels where there are any and where reading them is faster than decoding.

    Pixels of images that were made smaller are taken only where `shrunken` ones will do.
    DataError: they are damaged, or not where `loader.pixels_dir` says.
    """
    if loader.pixels == "never":
        return images
    store = PixelStore.find(index, Path(loader.pixels_dir) if loader.pixels_dir else None)
    if store is None or (store.info.max_side is not None and not shrunken):
        return images
    num_rows = store.info.num_stored
    if store.info.max_side is not None:  # which rows are read makes a difference, so it may not depend on the machine
        message = "%s: images were stored with sides of at most %d px; views are cut from these, not from the JPEGs"
        log.warning(message, store.folder, store.info.max_side)
    elif loader.pixels == "auto":
        num_rows = _rows_worth_reading(images, store, num_threads=loader.num_threads or num_cores())
    return PixelSource(images, store, num_rows=num_rows) if num_rows else images


def images_identity(index: ShardIndex, loader: LoaderConfig) -> str:
    """What the views of a training are cut from: the dataset's fingerprint, and whether smaller images stand in for its own."""
    folder = Path(loader.pixels_dir) if loader.pixels_dir else None
    store = PixelStore.find(index, folder, level=logging.DEBUG) if loader.pixels != "never" else None  # the loader warns
    if store is None or store.info.max_side is None:
        return index.fingerprint
    return f"{index.fingerprint} with {store.info.num_stored} images of at most {store.info.max_side} px"


def _rows_worth_reading(images: ImageSource, store: PixelStore, *, num_threads: int) -> int:
    """All rows if their pixels fit into memory or the disk is faster than decoding, measured now; else as many as fit."""
    memory, num_stored = int(_SHARE * available_memory()), store.info.num_stored
    if store.info.num_bytes <= memory:
        return num_stored
    read_s, decode_s = _time_to_read(store), _time_to_decode(images, num_stored) / num_threads
    measured = f"{1e3 * read_s:.2f} ms an image from {store.folder}, {1e3 * decode_s:.2f} ms to decode it on {num_threads} cores"
    if read_s < decode_s:
        log.info(
            "stored pixels (%s) are more than memory holds but are read faster than decoded: %s",
            human_bytes(store.info.num_bytes),
            measured,
        )
        return num_stored
    ends = np.cumsum(3 * store.table["height"].astype(np.int64) * store.table["width"])
    num_rows = min(num_stored, int(np.searchsorted(ends, memory, "right")))
    log.warning(
        "memory holds the stored pixels of %s of %s images (%s of %s), and reading takes longer than decoding: %s; the other images are "
        "decoded (loader.pixels=always reads all)",
        f"{num_rows:,}", f"{num_stored:,}", human_bytes(memory), human_bytes(store.info.num_bytes), measured,
    )  # fmt: skip
    return num_rows


def _time_to_read(store: PixelStore) -> float:
    """Seconds that the disk takes for the pixels of an image, several being read at once and none of them from memory."""
    rows = _trial_rows(store.info.num_stored)
    with ThreadPoolExecutor(_TRIAL_READERS) as pool:
        start = time.perf_counter()
        list(pool.map(store.read_from_disk, rows))
        return (time.perf_counter() - start) / len(rows)


def _time_to_decode(images: ImageSource, num_stored: int) -> float:
    """Seconds of one core that decoding an image takes."""
    rows = _trial_rows(num_stored)
    data = [image for image in images.views(np.array(rows)) if not isinstance(image, Decoded)]
    whole = np.zeros((len(data), 4), np.int64)
    whole[:, 2:] = np.iinfo(np.int32).max  # trimmed to the image
    with closing(Decoder(1)) as decoder:
        decoder.decode(data[:1], whole[:1].copy())  # the first call builds the pipeline
        start = time.perf_counter()
        decoder.decode(data, whole)
        return (time.perf_counter() - start) / max(1, len(data))


def _trial_rows(num: int) -> list[int]:
    return random.Random(0).sample(range(num), min(num, _TRIAL_IMAGES))
