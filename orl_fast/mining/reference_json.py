"""The reference implementation's three JSON files: mined results of ours for it, and its published ones for us.

In them an image is its position in the file's own list, and boxes are xywh integers. Images are matched by file name. The proposals file
names no images: it follows the order of the annotation file.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.config import MiningConfig
from orl_fast.errors import DataError
from orl_fast.files import atomic_file
from orl_fast.mining.objects import annotation_files, read_json, rows_of_names
from orl_fast.mining.pairs import write_pair_shards
from orl_fast.mining.rois import join_boxes, open_boxes, save_shards
from orl_fast.mining.stage import IMPORTED, Stage
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, NeighborTable, PairTable, TableInfo, new_table

# Their names for our limits.
_LIMITS = {
    "bbox_min_size": "min_side_px",
    "bbox_max_aspect_ratio": "max_aspect",
    "bbox_max_iou": "max_iou",
    "intra_bbox_num": "max_rois",
}


def export_neighbors(stage: Stage, file: Path) -> None:
    """Write the first `mining.num_neighbors` neighbors of each image."""
    stage.info("neighbors")
    neighbors = NeighborTable.open(stage.folder / "neighbors").neighbors[:, : stage.num_neighbors]
    info = {"knn_image_num": neighbors.shape[1]}
    _write(file, stage.index, info, {"knn_image_id": (row.tolist() for row in neighbors)})


def export_proposals(stage: Stage, file: Path) -> None:
    """Write all proposals, in the order of the annotation file; none for images that it lists but that are not packed."""
    stage.info("proposals")
    index, folder = stage.index, stage.folder / "proposals"
    shard, boxes = -1, BoxTable.from_lists([])

    def proposals(row: int) -> list[list[int]]:
        nonlocal shard, boxes
        if row < 0:
            return []
        if index.shard_ids[row] != shard:
            shard = int(index.shard_ids[row])
            boxes = open_boxes(folder, shard)
        return _xywh(boxes.of(row - index.shard_rows(shard).start))

    rows = _annotated_order(index, stage.annotations)
    with atomic_file(file) as out:
        _write_object(out.write, {"bbox": (proposals(row) for row in rows.tolist())})


def export_pairs(stage: Stage, file: Path) -> None:
    """Write RoIs, neighbors and corresponding RoIs, limited to what the configuration asks for."""
    found, rois_info = stage.info("pairs"), stage.info("rois")
    rois, mining = BoxTable.open(stage.folder / "rois"), stage.config.mining
    ratio = min(mining.pair_ratio, found.settings["pair_ratio"])
    pairs = PairTable.open(stage.folder / "pairs")
    pairs = pairs.limited(rois, num_neighbors=stage.num_neighbors, pair_ratio=ratio, compat=stage.config.compat)

    def entries(image: int) -> list[list[list[int]]]:
        own = _xywh(rois.of(image))
        lists = []
        for neighbor, first, count in zip(pairs.neighbors[image], pairs.first[image], pairs.count[image], strict=True):
            theirs, rows = _xywh(rois.of(neighbor)), range(first, first + count)
            lists.append([own[pairs.query_roi[row]] + theirs[pairs.partner_roi[row]] for row in rows])
        return lists

    limits = {theirs: rois_info.settings.get(ours, getattr(mining, ours)) for theirs, ours in _LIMITS.items()}
    columns = {
        "bbox": (_xywh(rois.of(image)) for image in range(len(rois))),
        "knn_image_id": (row.tolist() for row in pairs.neighbors),
        "knn_bbox_pair": (entries(image) for image in range(len(rois))),
    }
    info = {**limits, "knn_image_num": pairs.neighbors.shape[1], "knn_bbox_pair_ratio": ratio}
    _write(file, stage.index, info, columns)


def import_neighbors(stage: Stage, file: Path) -> None:
    """Take the neighbors of a file of the reference.

    Raises:
        DataError: the file is damaged, or does not tell everything about the packed images.
    """
    content, positions, rows = _matched(stage.index, file)
    lists = _column(content, "knn_image_id", file)
    _save_neighbors(stage, _neighbor_rows(stage.index, lists, positions, rows, file), _origin(file))


def import_proposals(stage: Stage, file: Path) -> None:
    """Take the proposals of a file of the reference, which follows the order of the annotation file. Raises as `import_neighbors`."""
    rows = _annotated_order(stage.index, stage.annotations)
    content = read_json(file)
    lists = content.get("bbox") if isinstance(content, dict) else None
    if not isinstance(lists, list) or len(lists) != len(rows):
        found = f"{len(lists)} images" if isinstance(lists, list) else "no list of boxes"
        raise DataError(f"{file}: holds {found}, the annotation file lists {len(rows)}; name the right one with --annotations FILE")
    found_lists = {row: _xyxy(stage.index, row, lists[position], file) for position, row in enumerate(rows.tolist()) if row >= 0}
    boxes = BoxTable.from_lists([found_lists[row] for row in range(len(stage.index))])
    _save_boxes(stage, "proposals", boxes, _origin(file))


def import_pairs(stage: Stage, file: Path) -> None:
    """Take RoIs, neighbors and corresponding RoIs of a file of the reference. Raises as `import_neighbors`."""
    index = stage.index
    content, positions, rows = _matched(index, file)
    box_lists, pair_lists = _column(content, "bbox", file), _column(content, "knn_bbox_pair", file)
    neighbors = _neighbor_rows(index, _column(content, "knn_image_id", file), positions, rows, file)
    boxes = [_xyxy(index, row, box_lists[position], file) for row, position in enumerate(positions.tolist())]
    if not all(map(len, boxes)):
        raise DataError(f"{file}: some image has no boxes; the file is not whole")
    rois = BoxTable.from_lists(boxes)
    numbers = [{tuple(box): number for number, box in reversed(list(enumerate(_xywh(found))))} for found in boxes]
    count = np.zeros(neighbors.shape, np.int32)
    found_pairs: list[tuple[int, int]] = []
    try:
        for row, position in enumerate(positions.tolist()):
            for k, (neighbor, pairs) in enumerate(zip(neighbors[row].tolist(), pair_lists[position], strict=True)):
                count[row, k] = len(pairs)
                found_pairs += [(numbers[row][tuple(pair[:4])], numbers[neighbor][tuple(pair[4:])]) for pair in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: pairs of {index.file_names[row]!r} are not pairs of the boxes listed ({error!r})") from error
    if count.min() < 1:
        raise DataError(f"{file}: some image has no pairs with one of its neighbors; the file is not whole")
    ends = np.cumsum(count, dtype=np.int64).reshape(count.shape)
    query, partner = np.array(found_pairs, np.int16).T
    table = PairTable(
        neighbors=neighbors,
        first=ends - count,
        count=count,
        query_roi=query,
        partner_roi=partner,
        similarities=np.full(len(query), np.nan, np.float32),
    )
    origin, told = _origin(file), content.get("info", {})
    limits = {ours: told[theirs] for theirs, ours in _LIMITS.items() if theirs in told}
    made_from = {
        "neighbors": _save_neighbors(stage, neighbors, origin).fingerprint,
        "rois": _save_boxes(stage, "rois", rois, {**origin, **limits}).fingerprint,
    }
    ratio = float(told.get("knn_bbox_pair_ratio", MiningConfig().pair_ratio))
    settings = {**origin, "num_neighbors": neighbors.shape[1], "pair_ratio": ratio, "compat": "official"}
    info = TableInfo(kind="pairs", made_from={"index": index.fingerprint, **made_from}, settings=settings)
    with new_table(stage.folder / "pairs", info) as folder:
        table.write_arrays(folder)
        write_pair_shards(folder, index=index, rois=rois, pairs=table)


def _matched(index: ShardIndex, file: Path) -> tuple[dict[str, Any], NDArray[np.int64], NDArray[np.int64]]:
    """The content; the position in the file of each packed image [N]; and the row of each position, -1 where it is not packed."""
    content = read_json(file)
    try:
        names = [str(name) for name in content["images"]["file_name"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: is no file of mined results of the reference (images.file_name is missing)") from error
    rows = rows_of_names(index, names)
    positions = np.full(len(index), -1, np.int64)
    positions[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    missing = np.flatnonzero(positions < 0)
    if len(missing):
        raise DataError(
            f"{file}: does not list {len(missing)} of {len(index)} packed images, first {index.file_names[int(missing[0])]!r}; "
            "it was mined from other images"
        )
    return content, positions, rows


def _column(content: dict[str, Any], name: str, file: Path) -> list[Any]:
    column = content.get("pseudo_annotations", {}).get(name)
    if not isinstance(column, list) or len(column) != len(content["images"]["file_name"]):
        raise DataError(f"{file}: pseudo_annotations.{name} is missing or has not one entry per image")
    return column


def _neighbor_rows(
    index: ShardIndex, lists: list[list[int]], positions: NDArray[np.int64], rows: NDArray[np.int64], file: Path
) -> NDArray[np.int64]:
    """[N, K] rows, from positions in the file."""
    try:
        neighbors = np.array([lists[position] for position in positions.tolist()], np.int64).reshape(len(index), -1)
        found: NDArray[np.int64] = rows[neighbors]
        if neighbors.size == 0 or neighbors.min() < 0:
            raise IndexError("no neighbors, or negative ones")
    except (ValueError, IndexError, TypeError) as error:
        raise DataError(f"{file}: knn_image_id does not hold K positions of images for each image ({error})") from error
    if found.min() < 0:
        raise DataError(
            f"{file}: {int((found < 0).any(axis=1).sum())} images have neighbors that are not packed; it was mined from more images"
        )
    return found


def _save_neighbors(stage: Stage, neighbors: NDArray[np.int64], origin: dict[str, Any]) -> TableInfo:
    settings = {**origin, "num_neighbors": neighbors.shape[1]}
    info = TableInfo(kind="neighbors", made_from={"index": stage.index.fingerprint}, settings=settings)
    similarities = np.full(neighbors.shape, np.nan, np.float32)  # the file tells none
    NeighborTable(neighbors=neighbors, similarities=similarities).save(stage.folder / "neighbors", info)
    return info


def _save_boxes(stage: Stage, kind: str, boxes: BoxTable, settings: dict[str, Any]) -> TableInfo:
    """Write proposals shard by shard, RoIs as one table."""
    index = stage.index
    info = TableInfo(kind=kind, made_from={"index": index.fingerprint}, settings=settings)
    with new_table(stage.folder / kind, info) as folder:
        save_shards(folder, range(index.num_shards), boxes, index=index)
        if kind == "rois":
            join_boxes(folder, num_shards=index.num_shards)
            for part in folder.glob("*-??????.npy"):
                part.unlink()
    return info


def _origin(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        return {IMPORTED: hashlib.file_digest(data, "sha256").hexdigest()[:16]}


def _annotated_order(index: ShardIndex, annotations: Path | None) -> NDArray[np.int64]:
    """The rows of all images in the order of the annotation files, -1 for those that are not packed; those not listed come last."""
    parts: list[NDArray[np.int64]] = []
    if annotations is None and not any(source.annotations for source in index.manifest.sources):
        return np.arange(len(index))
    for source, file in enumerate(annotation_files(index, annotations)):
        there = np.flatnonzero(index.sources == source)
        listed = np.empty(0, np.int64)
        if file is not None:
            listed = rows_of_names(index, [image["file_name"] for image in read_json(file)["images"]], source=source)
        parts += [listed, np.setdiff1d(there, listed)]
    return np.concatenate(parts)


def _xywh(boxes: NDArray[np.int16]) -> list[list[int]]:
    whole = boxes.astype(np.int64)
    found: list[list[int]] = np.concatenate([whole[:, :2], whole[:, 2:] - whole[:, :2]], axis=1).tolist()
    return found


def _xyxy(index: ShardIndex, row: int, boxes_xywh: Any, file: Path) -> NDArray[np.int16]:
    """[P, 4] int16, checked against the image's size."""
    name, width, height = index.file_names[row], int(index.widths[row]), int(index.heights[row])
    try:
        boxes = np.array(boxes_xywh, np.int64).reshape(-1, 4)
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: boxes of {name!r} are not [n, 4] integers ({error})") from error
    boxes[:, 2:] += boxes[:, :2]
    if (boxes < 0).any() or (boxes > [width, height, width, height]).any() or (boxes[:, 2:] <= boxes[:, :2]).any():
        raise DataError(f"{file}: a box of {name!r} does not lie within its {width} × {height} pixels; it was mined from other images")
    return boxes.astype(np.int16)


def _write(file: Path, index: ShardIndex, info: dict[str, Any], columns: Mapping[str, Iterator[Any]]) -> None:
    ids = index.image_ids.tolist()
    images = {"file_name": iter(index.file_names), "id": iter(ids)}
    with atomic_file(file) as out:
        out.write(b'{"info": ' + json.dumps(info).encode() + b', "images": ')
        _write_object(out.write, images)
        out.write(b', "pseudo_annotations": ')
        _write_object(out.write, {"image_id": iter(ids), **columns})
        out.write(b"}")


def _write_object(write: Callable[[bytes], Any], columns: Mapping[str, Iterable[Any]]) -> None:
    """{"name": [entries …], …}, one entry at a time: a file of proposals is larger than memory."""
    for i, (name, entries) in enumerate(columns.items()):
        write((", " if i else "{").encode() + json.dumps(name).encode() + b": [")
        for j, entry in enumerate(entries):
            write((b", " if j else b"") + json.dumps(entry).encode())
        write(b"]")
    write(b"}")
