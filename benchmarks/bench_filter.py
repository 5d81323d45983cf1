"""RoI filter, non-maximum suppression and jitter, on one core.

- filter: against the reference's algorithm in Python, on drawn boxes and on real proposals.
- nms: against torchvision.ops.nms, on boxes drawn like proposals; both give the same rows.
- jitter: a batch against the reference's algorithm in Python.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from benchmarks.harness import Contender, Row, compare
from benchmarks.photographs import load_jpegs
from orl_fast.boxes import filter_proposals, nms
from orl_fast.selective_search import selective_search
from orl_fast.shards.images import decode_rgb
from orl_fast.views.chance import jitter_boxes
from orl_fast.views.specs import JitteredRoi

COUNTS = (100, 2_500, 20_000)


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """Rows in the groups filter, nms and jitter."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _filter(source, quick=quick) + _nms(quick=quick) + _jitter(rounds=3 if quick else 9)
    finally:
        torch.set_num_threads(num_threads)


def reference_filter(boxes_xywh: list[list[int]], *, min_side_px: int = 96, max_rois: int = 100) -> list[int]:
    """The reference's algorithm: box by box in Python, the overlaps with the boxes kept by NumPy; cut to `max_rois` at the end."""
    kept: list[int] = []
    for row, (_, _, w, h) in enumerate(boxes_xywh):
        if w < min_side_px or h < min_side_px or w / h > 3 or h / w > 3:
            continue
        if kept and _overlaps(np.array([boxes_xywh[other] for other in kept]), np.array(boxes_xywh[row])).max() > 0.5:
            continue
        kept.append(row)
    return kept[:max_rois] or [0]


def _overlaps(boxes: NDArray[np.int64], box: NDArray[np.int64]) -> NDArray[np.float64]:
    """[K]: IoU of xywh boxes [K, 4] with one."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, :2] + boxes[:, 2:], box[:2] + box[2:])
    shared = np.maximum(high - low, 0.0).prod(axis=1)
    overlaps: NDArray[np.float64] = shared / (boxes[:, 2:].prod(axis=1) + box[2:].prod() - shared)
    return overlaps


def _iou(a: list[int], b: list[int]) -> float:
    w = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    h = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def draw_boxes(num: int, *, seed: int = 0) -> NDArray[np.int16]:
    """[num, 4] boxes of all sizes, as selective search proposes them in a 640 × 480 image."""
    rng = np.random.default_rng(seed)
    centers, sides = rng.uniform(0, 1, (num, 2)) * [640, 480], np.exp(rng.uniform(np.log(20), np.log(400), (num, 2)))
    corners = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    return np.asarray(np.rint(np.clip(corners, 0, [640, 480, 640, 480])), np.int16)


def _repeated(work: Callable[[], Any], times: int, units: int) -> Callable[[], float]:
    def run() -> float:
        for _ in range(times):
            work()
        return float(times * units)

    return run


def _filter(source: Path | None, *, quick: bool) -> list[Row]:
    rows = []
    cases = {f"filter, {num:,} boxes": draw_boxes(num) for num in COUNTS}
    for i, jpeg in enumerate(load_jpegs(source, limit=1 if quick else 3)):
        boxes = selective_search(np.asarray(decode_rgb(jpeg)), seed=0)
        cases[f"filter, {len(boxes):,} proposals of picture {i + 1}"] = boxes
    for name, boxes in cases.items():
        plain = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
        assert reference_filter(plain) == filter_proposals(boxes).tolist()
        contenders = [
            Contender(name="the reference's loop", run=_repeated(partial(reference_filter, plain), 1, len(boxes))),
            Contender(name="filter_proposals", run=_repeated(partial(filter_proposals, boxes), 200, len(boxes))),
        ]
        rows += compare(contenders, unit="boxes/s", rounds=3 if quick else 9, group=name)
    return rows


def _nms(*, quick: bool) -> list[Row]:
    rows = []
    for num in COUNTS:
        boxes = draw_boxes(num).astype(np.float32)
        scores = np.random.default_rng(1).random(num, np.float32)
        tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
        assert torchvision.ops.nms(*tensors, 0.5).tolist() == nms(boxes, scores, 0.5).tolist()
        times = max(1, 50_000 // num) if num < COUNTS[-1] else 1
        contenders = [
            Contender(name="torchvision.ops.nms", run=_repeated(partial(torchvision.ops.nms, *tensors, 0.5), times, num)),
            Contender(name="nms", run=_repeated(partial(nms, boxes, scores, 0.5), times, num)),
        ]
        rows += compare(contenders, unit="boxes/s", rounds=3 if quick else 9, group=f"nms, {num:,} boxes, IoU 0.5")
    return rows


def _jitter(*, rounds: int) -> list[Row]:
    boxes = draw_boxes(512)
    plain = boxes.tolist()
    images = np.arange(len(boxes), dtype=np.int64)
    sizes = np.tile(np.array([480, 640], np.int64), (len(boxes), 1))
    ours = partial(jitter_boxes, boxes, sizes=sizes, seed=0, epoch=0, images=images, stream=0, jitter=JitteredRoi())
    contenders = [
        Contender(name="the reference's loop", run=_repeated(lambda: [reference_jitter(box, 640, 480) for box in plain], 1, len(boxes))),
        Contender(name="jitter_boxes", run=_repeated(ours, 20, len(boxes))),
    ]
    return compare(contenders, unit="boxes/s", rounds=rounds, group="jitter, 512 boxes")


def reference_jitter(box: list[int], width: int, height: int) -> list[int]:
    """The reference's algorithm for one box, with its own random numbers."""
    own = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    for _ in range(200):
        area = own[2] * own[3] * np.random.uniform(0.5, 2)
        ratio = math.exp(np.random.uniform(math.log(0.5), math.log(2)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        x = round(own[0] + 0.5 * own[2] + np.random.uniform(-0.5, 0.5) * own[2] - 0.5 * w)
        y = round(own[1] + 0.5 * own[3] + np.random.uniform(-0.5, 0.5) * own[3] - 0.5 * h)
        if x >= 0 and y >= 0 and x + w <= width and y + h <= height and _iou(own, [x, y, w, h]) > 0.5:
            return [x, y, x + w, y + h]
    return box
