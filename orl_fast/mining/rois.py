"""Raw proposals of each image, and the RoIs kept of them (paper, section 3.2, stage 2 ii; appendix B), shard by shard."""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orl_fast.boxes import filter_table
from orl_fast.files import write_array
from orl_fast.mining.parts import Advance, join_arrays, open_part, part_path, pieces
from orl_fast.mining.proposals import Backend, selective_search
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.workers import run_in_workers
from orl_fast.tables import BoxTable

COUNTS, BOXES = "counts", "boxes"  # the arrays of a shard; counts are written last
_IMAGES_PER_TASK = 8


def propose_shards(
    folder: Path, shards: Sequence[int], advance: Advance, *, index: ShardIndex, backend: Backend, seed: int, num_workers: int
) -> None:
    """Write the proposals of some shards, images in parallel worker processes.

    Args:
        seed: of the proposals' order; with the image's row it gives the image's own.
    """
    tasks = (images for shard in shards for images in pieces(index.shard_rows(shard), _IMAGES_PER_TASK))
    found: dict[int, dict[int, NDArray[np.int16]]] = defaultdict(dict)  # boxes by shard and image, until a shard is whole
    for images, boxes in run_in_workers(partial(_propose, index=index, backend=backend, seed=seed), tasks, num_workers=num_workers):
        shard = int(index.shard_ids[images.start])
        found[shard].update(zip(images, boxes, strict=True))
        rows = index.shard_rows(shard)
        if len(found[shard]) == len(rows):
            of_image = found.pop(shard)
            save_boxes(folder, shard, BoxTable.from_lists([of_image[row] for row in rows]))
        advance(len(images))


def _propose(images: range, *, index: ShardIndex, backend: Backend, seed: int) -> tuple[range, list[NDArray[np.int16]]]:
    """Proposals of a few images. Runs in a worker process."""
    cv2.setNumThreads(1)  # images are the parallel unit
    found = []
    with ShardReader(index) as reader:
        for image in images:
            with Image.open(io.BytesIO(reader.read(image))) as decoded:
                pixels = np.asarray(decoded.convert("RGB"))
            if max(pixels.shape) > np.iinfo(np.int16).max:
                found.append(np.empty((0, 4), np.int16))  # beyond what boxes hold: taken as a whole
            else:
                own_seed = int(np.random.SeedSequence((seed, image)).generate_state(1)[0])
                found.append(selective_search(pixels, seed=own_seed, backend=backend))
    return images, found


def filter_shards(
    folder: Path, shards: Sequence[int], advance: Advance, *, index: ShardIndex, source: Path, limits: Mapping[str, Any], num_threads: int
) -> None:
    """Write the RoIs of some shards: what `orl_fast.boxes.filter_table` keeps within these limits of the proposals in `source`."""
    for shard in shards:
        images = index.shard_rows(shard)
        heights, widths = (sizes[images.start : images.stop] for sizes in (index.heights, index.widths))
        found = open_boxes(source, shard)
        save_boxes(folder, shard, filter_table(found, heights=heights, widths=widths, **limits, num_threads=num_threads))
        advance(len(images))


def join_boxes(folder: Path, *, num_shards: int) -> None:
    """Join the shards' boxes into the arrays of a BoxTable."""
    join_arrays(folder / "boxes.npy", (open_part(folder, BOXES, shard) for shard in range(num_shards)))
    join_arrays(folder / "offsets.npy", _offsets(folder, num_shards))


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
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(open_part(folder, COUNTS, shard), dtype=np.int64)])
    return BoxTable(offsets=offsets, boxes=open_part(folder, BOXES, shard))


def _offsets(folder: Path, num_shards: int) -> Iterator[NDArray[np.int64]]:
    end = np.zeros(1, np.int64)
    yield end
    for shard in range(num_shards):
        offsets = end + np.cumsum(open_part(folder, COUNTS, shard), dtype=np.int64)
        yield offsets
        end = offsets[-1:]
