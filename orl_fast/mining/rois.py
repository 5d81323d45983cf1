"""Raw proposals of each image, and the RoIs kept of them (paper, section 3.2, stage 2 ii; appendix B), shard by shard."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.boxes import filter_proposals
from orl_fast.files import write_array
from orl_fast.mining.executor import Executor
from orl_fast.mining.parts import join_arrays, open_part, part_path, pieces
from orl_fast.selective_search import Backend, one_opencv_thread, selective_search
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import decode_rgb
from orl_fast.tables import BoxTable

COUNTS, BOXES = "counts", "boxes"  # the arrays of a shard; counts are written last
_IMAGES_PER_TASK = 8
_MAX_PX = np.iinfo(np.int16).max  # no box reaches beyond


def propose_shards(
    folder: Path, shards: Sequence[int], *, index: ShardIndex, backend: Backend, seed: int, executor: Executor
) -> Iterator[int]:
    """Write the proposals of some shards, images in parallel; yield how many are done.

    Args:
        seed: of the proposals' order; with the image's row it gives the image's own.
    """
    tasks = (images for shard in shards for images in pieces(index.shard_rows(shard), _IMAGES_PER_TASK))
    found: dict[int, dict[int, NDArray[np.int16]]] = defaultdict(dict)  # boxes by shard and image, until a shard is whole
    for images, boxes in executor.map(partial(_propose, index=index, backend=backend, seed=seed), tasks):
        shard = int(index.shard_ids[images.start])
        found[shard].update(zip(images, boxes, strict=True))
        rows = index.shard_rows(shard)
        if len(found[shard]) == len(rows):
            of_image = found.pop(shard)
            save_boxes(folder, shard, BoxTable.from_lists([of_image[row] for row in rows]))
        yield len(images)


def _propose(images: range, *, index: ShardIndex, backend: Backend, seed: int) -> tuple[range, list[NDArray[np.int16]]]:
    """Proposals of a few images. Runs in a worker process."""
    found = []
    with ShardReader(index) as reader, one_opencv_thread():  # images are the parallel unit
        for image in images:
            pixels = np.asarray(decode_rgb(reader.read(image)))
            if max(pixels.shape) > _MAX_PX:
                found.append(np.empty((0, 4), np.int16))  # larger than boxes can hold: the filter takes the whole image
            else:
                own_seed = int(np.random.SeedSequence((seed, image)).generate_state(1)[0])
                found.append(selective_search(pixels, seed=own_seed, backend=backend))
    return images, found


def filter_shards(folder: Path, shards: Sequence[int], *, index: ShardIndex, source: Path, limits: Mapping[str, Any]) -> Iterator[int]:
    """Write the RoIs of some shards: what `filter_table` keeps within these limits of the proposals in `source`; yield as above."""
    for shard in shards:
        images = index.shard_rows(shard)
        heights, widths = (sizes[images.start : images.stop] for sizes in (index.heights, index.widths))
        found = open_boxes(source, shard)
        save_boxes(folder, shard, filter_table(found, heights=heights, widths=widths, limits=limits))
        yield len(images)


def filter_table(proposals: BoxTable, *, heights: NDArray[np.int32], widths: NDArray[np.int32], limits: Mapping[str, Any]) -> BoxTable:
    """The RoIs of every image of a table, at least one each: `filter_proposals` with these limits.

    Boxes are clipped to their image first; an image without proposals gets one RoI, the whole image.

    Args:
        heights, widths: [N] int32, pixels.
    """
    kept = []
    for image, (height, width) in enumerate(zip(heights, widths, strict=True)):
        frame = np.array([width, height, width, height]).clip(max=_MAX_PX).astype(np.int16)
        found = proposals.of(image)
        boxes = np.clip(found, 0, frame) if len(found) else np.array([[0, 0, frame[0], frame[1]]])
        kept.append(boxes[filter_proposals(boxes, **limits)])
    return BoxTable.from_lists(kept)


def join_boxes(folder: Path, *, num_shards: int) -> None:
    """Join the shards' boxes into the arrays of a BoxTable."""
    join_arrays(folder / "boxes.npy", (open_part(folder, BOXES, shard) for shard in range(num_shards)))
    counts = (open_part(folder, COUNTS, shard) for shard in range(num_shards))
    write_array(folder / "offsets.npy", np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts])))


def save_boxes(folder: Path, shard: int, table: BoxTable) -> None:
    """Write the boxes of one shard's images."""
    write_array(part_path(folder, BOXES, shard), table.boxes)
    write_array(part_path(folder, COUNTS, shard), table.counts)


def save_shards(folder: Path, shards: Sequence[int], table: BoxTable, *, index: ShardIndex) -> Iterator[int]:
    """Write the boxes of some shards out of those of all images; yield as above."""
    for shard in shards:
        save_boxes(folder, shard, BoxTable.from_lists([table.of(image) for image in index.shard_rows(shard)]))
        yield len(index.shard_rows(shard))


def open_boxes(folder: Path, shard: int) -> BoxTable:
    """The boxes of one shard's images; image 0 is the shard's first."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(open_part(folder, COUNTS, shard), dtype=np.int64)])
    return BoxTable(offsets=offsets, boxes=open_part(folder, BOXES, shard))
