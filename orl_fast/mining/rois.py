"""Raw proposals of each image, and the RoIs kept of them (paper, section 3.2, stage 2 ii; appendix B), shard by shard."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.boxes import filter_proposals
from orl_fast.files import write_array
from orl_fast.mining.executor import Executor
from orl_fast.mining.objects import object_boxes
from orl_fast.mining.step import join_arrays, open_part, part_path
from orl_fast.selective_search import Backend, one_opencv_thread, selective_search
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import decode_rgb
from orl_fast.tables import BoxTable

MAX_PX = np.iinfo(np.int16).max  # no box reaches beyond
_IMAGES_PER_TASK = 8


def propose_shards(
    folder: Path, shards: Sequence[int], *, index: ShardIndex, backend: Backend, seed: int, executor: Executor
) -> Iterator[int]:
    """Write the proposals of some shards, images in parallel; yield how many are done.

    `seed` is that of the proposals' order; with the image's row it gives the image's own.
    """
    rows = {shard: index.shard_rows(shard) for shard in shards}
    tasks = (images[start : start + _IMAGES_PER_TASK] for images in rows.values() for start in range(0, len(images), _IMAGES_PER_TASK))
    found: dict[int, dict[int, NDArray[np.int16]]] = defaultdict(dict)  # boxes by shard and image, until a shard is whole
    for images, boxes in executor.map(partial(_propose, index=index, backend=backend, seed=seed), tasks):
        shard = int(index.shard_ids[images.start])
        found[shard].update(zip(images, boxes, strict=True))
        if len(found[shard]) == len(rows[shard]):
            of_image = found.pop(shard)
            save_boxes(folder, shard, BoxTable.from_lists([of_image[row] for row in rows[shard]]))
        yield len(images)


def _propose(images: range, *, index: ShardIndex, backend: Backend, seed: int) -> tuple[range, list[NDArray[np.int16]]]:
    """Proposals of a few images. Runs in a worker process."""
    found = []
    with ShardReader(index) as reader, one_opencv_thread():  # images are the parallel unit
        for image in images:
            pixels = np.asarray(decode_rgb(reader.read(image)))
            if max(pixels.shape) > MAX_PX:
                found.append(np.empty((0, 4), np.int16))  # larger than boxes can hold: the filter takes the whole image
            else:
                own_seed = int(np.random.SeedSequence((seed, image)).generate_state(1)[0])
                found.append(selective_search(pixels, seed=own_seed, backend=backend))
    return images, found


def filter_shards(folder: Path, shards: Iterable[int], *, index: ShardIndex, source: Path, limits: Mapping[str, Any]) -> Iterator[int]:
    """Write the RoIs of some shards: what `filter_table` keeps within these limits of the proposals in `source`; yield as above."""
    for shard in shards:
        images = index.shard_rows(shard)
        heights, widths = (sizes[images.start : images.stop] for sizes in (index.heights, index.widths))
        save_boxes(folder, shard, filter_table(open_boxes(source, shard), heights=heights, widths=widths, limits=limits))
        yield len(images)


def filter_table(proposals: BoxTable, *, heights: NDArray[np.int32], widths: NDArray[np.int32], limits: Mapping[str, Any]) -> BoxTable:
    """The RoIs of every image of a table, at least one each: `filter_proposals` with these limits.

    Boxes are clipped to their image first, `heights` and `widths` [N] in pixels; an image without proposals gets one RoI, the whole image.
    """
    kept = []
    for image, (height, width) in enumerate(zip(heights, widths, strict=True)):
        frame = np.array([width, height, width, height]).clip(max=MAX_PX).astype(np.int16)
        found = proposals.of(image)
        boxes = np.clip(found, 0, frame) if len(found) else np.array([[0, 0, frame[0], frame[1]]])
        kept.append(boxes[filter_proposals(boxes, **limits)])
    return BoxTable.from_lists(kept)


def save_shards(folder: Path, shards: Iterable[int], table: BoxTable, *, index: ShardIndex) -> Iterator[int]:
    """Write the boxes of some shards out of those of all images; yield as above."""
    for shard in shards:
        save_boxes(folder, shard, BoxTable.from_lists([table.of(image) for image in index.shard_rows(shard)]))
        yield len(index.shard_rows(shard))


def save_boxes(folder: Path, shard: int, table: BoxTable) -> None:
    """Write the boxes of one shard's images: counts last, whose file marks the shard as done."""
    write_array(part_path(folder, "boxes", shard), table.boxes)
    write_array(part_path(folder, "counts", shard), table.counts)


def open_boxes(folder: Path, shard: int) -> BoxTable:
    """The boxes of one shard's images; image 0 is the shard's first."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(open_part(folder, "counts", shard), dtype=np.int64)])
    return BoxTable(offsets=offsets, boxes=open_part(folder, "boxes", shard))


def join_boxes(folder: Path, *, num_shards: int) -> None:
    """Join the shards' boxes into the arrays of a BoxTable."""
    join_arrays(folder / "boxes.npy", (open_part(folder, "boxes", shard) for shard in range(num_shards)))
    counts = (open_part(folder, "counts", shard) for shard in range(num_shards))
    write_array(folder / "offsets.npy", np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts])))


def save_objects(folder: Path, shards: Iterable[int], *, index: ShardIndex, files: Sequence[Path | None]) -> Iterator[int]:
    """Write the objects of some shards in place of proposals, see `object_boxes`; yield as above."""
    return save_shards(folder, shards, object_boxes(index, files), index=index)
