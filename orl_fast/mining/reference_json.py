"""The reference implementation's three JSON files: mined results of ours for it, and its published ones for us.

In them an image is its position in the file's own list, and boxes are xywh integers. Images are matched by file name. The proposals file
names no images: it follows the order of the annotation file.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.coco import read_json
from orl_fast.config import MiningConfig
from orl_fast.console import log
from orl_fast.errors import DataError, StaleError
from orl_fast.files import atomic_file
from orl_fast.mining.objects import annotation_files, rows_of_names
from orl_fast.mining.pairs import write_pair_shards
from orl_fast.mining.pipeline import IMPORTED, Stage
from orl_fast.mining.rois import open_boxes, save_shards
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, NeighborTable, PairTable, TableInfo, activate, new_table, table_info

_REMEDY = "give another file"
# Their names for our limits.
_LIMITS = {"bbox_min_size": "min_side_px", "bbox_max_aspect_ratio": "max_aspect", "bbox_max_iou": "max_iou", "intra_bbox_num": "max_rois"}


def export_neighbors(stage: Stage, file: Path, *, num_neighbors: int | None = None) -> None:
    """Write the neighbors of each image: all that the table holds, or the first `num_neighbors`; StaleError if it holds fewer."""
    stage.info("neighbors")
    neighbors = NeighborTable.open(stage.folder / "neighbors").neighbors
    found = neighbors.shape[1]
    if (num_neighbors or 0) > found:
        raise StaleError(f"{stage.folder / 'neighbors'}: holds {found} neighbors, {num_neighbors} are asked for; use --neighbors {found}")
    neighbors = neighbors[:, :num_neighbors]
    _write(file, stage.index, {"knn_image_num": neighbors.shape[1]}, {"knn_image_id": (row.tolist() for row in neighbors)})


def export_proposals(stage: Stage, file: Path) -> None:
    """Write all proposals, in the order of the annotation file; none for images that it lists but that are not packed."""
    stage.info("proposals")
    index = stage.index
    boxes_of = lru_cache(maxsize=1)(partial(open_boxes, stage.folder / "proposals"))

    def proposals(row: int) -> list[list[int]]:
        shard = int(index.shard_ids[row])
        return _xywh(boxes_of(shard).of(row - index.shard_rows(shard).start))

    rows = _annotated_order(index, stage.annotations)
    with atomic_file(file) as out:
        _write_object(out.write, {"bbox": (proposals(row) if row >= 0 else [] for row in rows.tolist())})


def export_pairs(stage: Stage, file: Path, *, num_neighbors: int | None = None, pair_ratio: float | None = None) -> None:
    """Write RoIs, neighbors and corresponding RoIs: all that the tables hold, or fewer neighbors and a smaller ratio.

    StaleError if they hold fewer than asked for.
    """
    found, rois_info = stage.info("pairs"), stage.info("rois")
    rois, pairs = BoxTable.open(stage.folder / "rois"), PairTable.open(stage.folder / "pairs")
    ratio = pair_ratio or found.settings["pair_ratio"]
    if num_neighbors or pair_ratio:
        limit = num_neighbors or pairs.neighbors.shape[1]
        pairs = pairs.limited(rois, num_neighbors=limit, pair_ratio=ratio, variant=found.settings["compat"])

    def entries(image: int) -> list[list[list[int]]]:
        own = _xywh(rois.of(image))
        lists = []
        for neighbor, first, count in zip(pairs.neighbors[image], pairs.first[image], pairs.count[image], strict=True):
            theirs, rows = _xywh(rois.of(neighbor)), range(first, first + count)
            lists.append([own[pairs.query_roi[row]] + theirs[pairs.partner_roi[row]] for row in rows])
        return lists

    limits = {theirs: rois_info.settings.get(ours, getattr(stage.config.mining, ours)) for theirs, ours in _LIMITS.items()}
    columns = {
        "bbox": (_xywh(rois.of(image)) for image in range(len(rois))),
        "knn_image_id": (row.tolist() for row in pairs.neighbors),
        "knn_bbox_pair": (entries(image) for image in range(len(rois))),
    }
    info = {**limits, "knn_image_num": pairs.neighbors.shape[1], "knn_bbox_pair_ratio": ratio}
    _write(file, stage.index, info, columns)


def import_neighbors(stage: Stage, file: Path, *, skip_unknown: bool = False) -> None:
    """Take the neighbors of a file of the reference.

    Args:
        skip_unknown: leave out neighbors that are not packed. As tables are rectangular, an image with fewer neighbors than others repeats
            its nearest; one with none is its own neighbor.
    Raises:
        DataError: the file is damaged, or lacks packed images; or, without `skip_unknown`, has neighbors that are not packed.
    """
    neighbors, origin = _results(stage.index, file, skip_unknown=skip_unknown).neighbors, _origin(file)
    with stage.locked():
        _save_neighbors(stage, origin, neighbors)


def import_proposals(stage: Stage, file: Path) -> None:
    """Take the proposals of a file of the reference, which follows the order of the annotation file. Raises as `import_neighbors`."""
    index, rows = stage.index, _annotated_order(stage.index, stage.annotations)
    content = read_json(file, remedy=_REMEDY)
    lists = content.get("bbox") if isinstance(content, dict) else None
    if not isinstance(lists, list) or len(lists) != len(rows):
        found = f"{len(lists)} images" if isinstance(lists, list) else "no list of boxes"
        raise DataError(f"{file}: holds {found}, the annotation file lists {len(rows)}; name the right one with --annotations FILE")
    boxes = _boxes(index, [lists[place] for place in _places(rows, len(index)).tolist()], file)
    settings = {"order": hashlib.sha256(rows.tobytes()).hexdigest()[:16]}
    origin, shards = _origin(file), range(index.num_shards)
    with stage.locked():
        _save(stage, "proposals", origin, settings, lambda folder: list(save_shards(folder, shards, boxes, index=index)))


def import_pairs(stage: Stage, file: Path, *, skip_unknown: bool = False) -> None:
    """Take RoIs, neighbors and corresponding RoIs of a file of the reference; see `import_neighbors`.

    With `skip_unknown`, the RoIs of an image without packed neighbors correspond to themselves.
    """
    index, origin = stage.index, _origin(file)
    results = _results(index, file, "bbox", "knn_bbox_pair", skip_unknown=skip_unknown)
    info, neighbors, (boxes, pairs_of_images) = results.info, results.neighbors, results.columns
    ratio = float(info.get("knn_bbox_pair_ratio", MiningConfig().pair_ratio))
    rois = _boxes(index, boxes, file)
    if not rois.counts.all():
        raise DataError(f"{file}: some image has no boxes; the file is incomplete")
    numbers = [{tuple(box): number for number, box in reversed(list(enumerate(_xywh(rois.of(row)))))} for row in range(len(rois))]
    count = np.zeros(neighbors.shape, np.int32)
    found: list[tuple[int, int]] = []
    for row, lists in enumerate(pairs_of_images):
        try:
            if len(lists) != results.num_listed:
                raise ValueError(f"{len(lists)} lists for {results.num_listed} neighbors")
            for k, (neighbor, place) in enumerate(zip(neighbors[row].tolist(), results.places[row].tolist(), strict=True)):
                own = rois.of(row)[: max(1, int(ratio * len(rois.of(row))))]
                pairs = lists[place] if place >= 0 else [box + box for box in _xywh(own)]
                count[row, k] = len(pairs)
                found += [(numbers[row][tuple(pair[:4])], numbers[neighbor][tuple(pair[4:])]) for pair in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: pairs of {index.file_names[row]!r} are not pairs of the boxes listed ({error!r})") from error
    if not count.all():
        raise DataError(f"{file}: some image has no pairs with one of its neighbors; the file is incomplete")
    first = np.cumsum(count, dtype=np.int64).reshape(count.shape) - count
    query, partner = np.array(found, np.int16).T
    unknown = np.full(len(query), np.nan, np.float32)
    table = PairTable(neighbors=neighbors, first=first, count=count, query_roi=query, partner_roi=partner, similarities=unknown)
    limits = {ours: info[theirs] for theirs, ours in _LIMITS.items() if theirs in info}

    def write(folder: Path) -> None:
        table.write_arrays(folder)
        write_pair_shards(folder, index=index, rois=rois, pairs=table)

    with stage.locked():
        made_from = _save_neighbors(stage, origin, neighbors), _save(stage, "rois", origin, limits, rois.write_arrays)
        settings = {"num_neighbors": neighbors.shape[1], "pair_ratio": ratio, "compat": "official"}
        _save(stage, "pairs", origin, settings, write, made_from)


@dataclass(frozen=True, kw_only=True)
class _Results:
    """What a file of mined results holds about the packed images, in their order."""

    info: Mapping[str, Any]  # what it says of itself
    neighbors: NDArray[np.int64]  # [N, K] rows
    places: NDArray[np.int64]  # [N, K] where each of these is in the file's list; -1: it is the image itself, which has no others
    num_listed: int  # neighbors of an image in the file
    columns: Sequence[Sequence[Any]]  # those asked for


def _results(index: ShardIndex, file: Path, *names: str, skip_unknown: bool) -> _Results:
    """Read a file of mined results, with these columns; images are matched by name. Raises as `import_neighbors`."""
    content = read_json(file, remedy=_REMEDY)
    try:
        rows = rows_of_names(index, [str(name) for name in content["images"]["file_name"]])
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not a file of mined results of the reference (images.file_name is missing)") from error
    places = _places(rows, len(index))
    missing = np.flatnonzero(places < 0)
    if len(missing):
        raise DataError(
            f"{file}: does not list {len(missing)} of {len(index)} packed images, first {index.file_names[int(missing[0])]!r}; "
            "it was mined from other images"
        )

    def column(name: str) -> list[Any]:
        entries = content.get("pseudo_annotations", {}).get(name)
        if not isinstance(entries, list) or len(entries) != len(rows):
            raise DataError(f"{file}: pseudo_annotations.{name} is missing or has not one entry per image")
        return [entries[place] for place in places.tolist()]

    columns, lists = [column(name) for name in names], column("knn_image_id")
    try:
        neighbors = np.array(lists, np.int64).reshape(len(lists), -1)
        found: NDArray[np.int64] = rows[neighbors]
        if neighbors.size == 0 or neighbors.min() < 0:
            raise IndexError("no neighbors, or negative ones")
    except (ValueError, IndexError, TypeError) as error:
        raise DataError(f"{file}: knn_image_id does not hold K positions of images for each image ({error})") from error
    if found.min() < 0 and not skip_unknown:
        num = int((found < 0).any(axis=1).sum())
        raise DataError(
            f"{file}: {num} images have neighbors that are not packed; it was mined from more images; leave these out with --skip-unknown"
        )
    kept = _known(found >= 0)
    neighbors = np.where(kept < 0, np.arange(len(index))[:, None], np.take_along_axis(found, kept, axis=1))
    _log_skipped(index, file, found >= 0)
    return _Results(info=content.get("info", {}), neighbors=neighbors, places=kept, num_listed=found.shape[1], columns=columns)


def _known(known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[N, K'] places of what is known of each row of `known` [N, K], in order and then from the first on; -1 where nothing is.

    K' is the most that any row has, at least 1.
    """
    num = known.sum(axis=1)
    in_order, around = np.argsort(~known, axis=1, kind="stable"), np.arange(max(1, num.max())) % np.maximum(num, 1)[:, None]
    return np.where(num[:, None] > 0, np.take_along_axis(in_order, around, axis=1), -1)


def _log_skipped(index: ShardIndex, file: Path, known: NDArray[np.bool_]) -> None:
    num = known.sum(axis=1)
    if known.all():
        return
    few, none = int((num < num.max()).sum()), np.flatnonzero(num == 0)
    repeated = f"; {few} images have fewer than {num.max()}, of which the nearest are repeated" if few else ""
    alone = f"; {len(none)} of them have none and are their own neighbors, first {index.file_names[none[0]]!r}" if len(none) else ""
    log.warning("%s: %d of %d neighbors are not packed and left out%s%s", file, int((~known).sum()), known.size, repeated, alone)


def _places(rows: NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """[N]: where in a file each packed image is listed; -1: nowhere."""
    places = np.full(num_images, -1, np.int64)
    places[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    return places


def _origin(file: Path) -> str:
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_REMEDY}") from error


def _save(
    stage: Stage, kind: str, origin: str, settings: Mapping[str, Any], write: Callable[[Path], object], made_from: Iterable[TableInfo] = ()
) -> TableInfo:
    """Make an imported table the current one of its kind."""
    sources = {"index": stage.index.fingerprint, **{info.kind: info.fingerprint for info in made_from}}
    path, info = stage.folder / kind, TableInfo(kind=kind, made_from=sources, settings={IMPORTED: origin, **settings})
    activate(path, info.fingerprint)
    if table_info(path) is None:
        with new_table(path, info) as folder:
            write(folder)
    return info


def _save_neighbors(stage: Stage, origin: str, neighbors: NDArray[np.int64]) -> TableInfo:
    table = NeighborTable(neighbors=neighbors, similarities=np.full(neighbors.shape, np.nan, np.float32))  # the file has no similarities
    return _save(stage, "neighbors", origin, {"num_neighbors": neighbors.shape[1]}, table.write_arrays)


def _annotated_order(index: ShardIndex, annotations: Path | None) -> NDArray[np.int64]:
    """The rows of all images in the order of the annotation files, -1 for those that are not packed; those not listed come last."""
    if annotations is None and not any(source.annotations for source in index.manifest.sources):
        return np.arange(len(index))
    parts: list[NDArray[np.int64]] = []
    for source, file in enumerate(annotation_files(index, annotations)):
        try:
            names = [image["file_name"] for image in read_json(file, remedy=_REMEDY)["images"]] if file else []
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: not a COCO annotation file ({error!r}); name another with --annotations FILE") from error
        listed = rows_of_names(index, names, source=source)
        parts += [listed, np.setdiff1d(np.flatnonzero(index.sources == source), listed)]
    return np.concatenate(parts)


def _xywh(boxes: NDArray[np.int16]) -> list[list[int]]:
    found: list[list[int]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return found


def _boxes(index: ShardIndex, lists: Sequence[Any], file: Path) -> BoxTable:
    """Each image's boxes [P, 4] xywh as a table, checked against its size."""
    found = []
    for name, width, height, boxes_xywh in zip(index.file_names, index.widths, index.heights, lists, strict=True):
        try:
            boxes = np.array(boxes_xywh, np.int64).reshape(-1, 4)
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: boxes of {name!r} are not [n, 4] integers ({error})") from error
        boxes[:, 2:] += boxes[:, :2]
        if (boxes < 0).any() or (boxes > [width, height, width, height]).any() or (boxes[:, 2:] <= boxes[:, :2]).any():
            raise DataError(f"{file}: a box of {name!r} does not lie within its {width} × {height} pixels; it was mined from other images")
        found.append(boxes.astype(np.int16))
    return BoxTable.from_lists(found)


def _write(file: Path, index: ShardIndex, info: dict[str, Any], columns: Mapping[str, Iterable[Any]]) -> None:
    ids = index.image_ids.tolist()
    with atomic_file(file) as out:
        out.write(b'{"info": ' + json.dumps(info).encode() + b', "images": ')
        _write_object(out.write, {"file_name": index.file_names, "id": ids})
        out.write(b', "pseudo_annotations": ')
        _write_object(out.write, {"image_id": ids, **columns})
        out.write(b"}")


def _write_object(write: Callable[[bytes], Any], columns: Mapping[str, Iterable[Any]]) -> None:
    """{"name": [entries …], …}, one entry at a time: a file of proposals is larger than memory."""
    for i, (name, entries) in enumerate(columns.items()):
        write((", " if i else "{").encode() + json.dumps(name).encode() + b": [")
        for j, entry in enumerate(entries):
            write((b", " if j else b"") + json.dumps(entry).encode())
        write(b"]")
    write(b"}")
