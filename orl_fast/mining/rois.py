"""Raw proposals of each image, and the RoIs kept of them (paper, section 3.2, stage 2 ii; appendix B), shard by shard."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orl_fast.boxes import filter_table
from orl_fast.files import write_array
from orl_fast.mining.parts import join_arrays, part_path
from orl_fast.mining.proposals import Backend, selective_search
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.workers import run_in_workers
from orl_fast.tables import BoxTable, open_array

COUNTS, BOXES = "counts", "boxes"  # the arrays of a shard; counts are written last
_IMAGES_PER_TASK = 8


@dataclass(frozen=True, kw_only=True)
class Proposer:
    """Proposes boxes for whole shards, images in parallel worker processes.

    Attributes:
        folder: the table of proposals. seed: of the proposals' order; with the image's row it gives the image's own.
    """

    folder: Path
    index: ShardIndex
    backend: Backend
    seed: int
    num_workers: int

    def propose(self, shards: Sequence[int], advance: Callable[[int], None]) -> None:
        """Write the proposals of some shards."""
        waiting: dict[int, dict[int, list[NDArray[np.int16]]]] = {}
        for task, found in run_in_workers(_propose, self._tasks(shards), num_workers=self.num_workers):
            parts = waiting.setdefault(task.shard, {})
            parts[task.images.start] = found
            images = self.index.shard_rows(task.shard)
            if sum(map(len, parts.values())) == len(images):
                save_boxes(self.folder, task.shard, BoxTable.from_lists([boxes for start in sorted(parts) for boxes in parts[start]]))
                del waiting[task.shard]
            advance(len(found))

    def _tasks(self, shards: Sequence[int]) -> Iterator["_Task"]:
        for shard in shards:
            images = self.index.shard_rows(shard)
            for start in images[::_IMAGES_PER_TASK]:
                some = range(start, min(start + _IMAGES_PER_TASK, images.stop))
                yield _Task(index=self.index, shard=shard, images=some, backend=self.backend, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class _Task:
    index: ShardIndex
    shard: int
    images: range
    backend: Backend
    seed: int


def _propose(task: _Task) -> tuple[_Task, list[NDArray[np.int16]]]:
    """Proposals of a few images. Runs in a worker process."""
    cv2.setNumThreads(1)  # images are the parallel unit
    found = []
    with ShardReader(task.index) as reader:
        for image in task.images:
            with Image.open(io.BytesIO(reader.read(image))) as decoded:
                pixels = np.asarray(decoded.convert("RGB"))
            if max(pixels.shape) > np.iinfo(np.int16).max:
                found.append(np.empty((0, 4), np.int16))  # beyond what boxes hold: taken as a whole
            else:
                found.append(selective_search(pixels, seed=image_seed(task.seed, image), backend=task.backend))
    return task, found


def image_seed(seed: int, image: int) -> int:
    """The seed of one image's order of proposals."""
    return int(np.random.SeedSequence((seed, image)).generate_state(1)[0])


def filter_shards(
    folder: Path,
    shards: Sequence[int],
    *,
    index: ShardIndex,
    proposals: Path,
    limits: Mapping[str, Any],
    num_threads: int,
    advance: Callable[[int], None],
) -> None:
    """Write the RoIs of some shards: what `orl_fast.boxes.filter_table` keeps within these limits."""
    for shard in shards:
        images = index.shard_rows(shard)
        heights, widths = (sizes[images.start : images.stop] for sizes in (index.heights, index.widths))
        found = open_boxes(proposals, shard)
        save_boxes(folder, shard, filter_table(found, heights=heights, widths=widths, **limits, num_threads=num_threads))
        advance(len(images))


def join_boxes(folder: Path, *, index: ShardIndex) -> None:
    """Join the shards' boxes into the arrays of a BoxTable."""
    shards = range(index.num_shards)
    num = sum(len(open_array(folder, f"{BOXES}-{shard:06d}")) for shard in shards)
    join_arrays(folder / "boxes.npy", (open_boxes(folder, shard).boxes for shard in shards), shape=(num, 4), dtype=np.int16)
    join_arrays(folder / "offsets.npy", _offsets(folder, shards), shape=(len(index) + 1,), dtype=np.int64)


def save_boxes(folder: Path, shard: int, table: BoxTable) -> None:
    """Write the boxes of one shard's images."""
    write_array(part_path(folder, BOXES, shard), table.boxes)
    write_array(part_path(folder, COUNTS, shard), table.counts)


def save_shards(folder: Path, shards: Sequence[int], table: BoxTable, *, index: ShardIndex) -> None:
    """Write the boxes of some shards out of those of all images."""
    for shard in shards:
        save_boxes(folder, shard, BoxTable.from_lists([table.of(image) for image in index.shard_rows(shard)]))


def open_boxes(folder: Path, shard: int) -> BoxTable:
    """The boxes of one shard's images; image 0 is the shard's first."""
    counts = open_array(folder, f"{COUNTS}-{shard:06d}")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return BoxTable(offsets=offsets, boxes=open_array(folder, f"{BOXES}-{shard:06d}"))


def _offsets(folder: Path, shards: range) -> Iterator[NDArray[np.int64]]:
    end = np.zeros(1, np.int64)
    yield end
    for shard in shards:
        offsets = end + np.cumsum(open_array(folder, f"{COUNTS}-{shard:06d}"), dtype=np.int64)
        yield offsets
        end = offsets[-1:]
