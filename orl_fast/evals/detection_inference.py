"""Detecting in images: each on one rank, its detections in COCO's format."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orl_fast.console import log, progress
from orl_fast.evals import Context
from orl_fast.evals.detection_data import DetectionData, Example, ahead, load_example
from orl_fast.evals.detection_masks import encode_mask
from orl_fast.evals.detection_model import Detections, Detector

_FOUND_AT_ONCE = 4  # images that wait to have their masks drawn


def detect(
    detector: Detector, data: DetectionData, *, category_ids: Sequence[int | None], short_px: int, max_px: int, bf16: bool, context: Context
) -> tuple[list[dict[str, Any]], list[int]]:
    """What a detector in eval mode finds in this rank's share of the images, in COCO's format, and the images that cannot be decoded.

    category_ids: of each of the detector's labels, from 1; detections of a label without one are left out.
    """
    ranks = context.ranks
    found: list[dict[str, Any]] = []
    unreadable: list[int] = []
    own = range(ranks.rank, len(data.paths), ranks.world_size)
    images = data.without_masks()

    def load(image: int) -> Example | str:
        return load_example(images, image, short_px=short_px, max_px=max_px)

    def detections(pool: ThreadPoolExecutor) -> Iterator[tuple[int, Detections, tuple[int, int]]]:
        for image, example in zip(own, ahead(pool, load, own, depth=2 * context.num_threads), strict=True):
            if isinstance(example, str):
                unreadable.append(image)
                log.warning("%s: left out of the test, %s", data.paths[image], example)
                continue
            with torch.inference_mode(), torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
                (detected,) = detector([to_device(example, context.device)])
            yield image, _to_cpu(detected), (example.image.shape[2], example.image.shape[1])

    def draw(each: tuple[int, Detections, tuple[int, int]]) -> list[dict[str, Any]]:
        image, detected, from_px = each
        to_px = (int(data.sizes_px[image, 0]), int(data.sizes_px[image, 1]))
        return found_objects(detected, image_id=int(data.image_ids[image]), category_ids=category_ids, from_px=from_px, to_px=to_px)

    silent: Callable[[int], None] = lambda count: None  # noqa: E731
    bar = progress("testing", total=len(own), unit="images") if ranks.is_main else nullcontext(silent)
    with ThreadPoolExecutor(context.num_threads) as pool, bar as advance:
        for objects in ahead(pool, draw, detections(pool), depth=_FOUND_AT_ONCE + context.num_threads):
            found += objects
            advance(1)
    return found, unreadable


def found_objects(
    found: Detections, *, image_id: int, category_ids: Sequence[int | None], from_px: Any, to_px: Any
) -> list[dict[str, Any]]:
    """Detections on an image resized to `from_px`, in COCO's format, on that of `to_px`; without those of a category of no id.

    Masks are drawn as Detectron2 does: sampled bilinearly at the pixels' centers, cut at 0.5.
    """
    scale = torch.tensor(to_px, dtype=torch.float64) / torch.tensor(from_px)
    boxes = (found.boxes.double() * scale.repeat(2)).clamp(min=0).minimum(torch.tensor(to_px).repeat(2).double())
    objects = []
    for i, (box, label, score) in enumerate(zip(boxes, found.labels.tolist(), found.scores.tolist(), strict=True)):
        category = category_ids[label - 1]
        x, y, right, bottom = box.tolist()
        if category is None or right <= x or bottom <= y:
            continue
        entry = {"image_id": image_id, "category_id": category, "bbox": [x, y, right - x, bottom - y], "score": score}
        if found.masks is not None:
            entry["segmentation"] = encode_mask(_paste(found.masks[i], box, to_px))
        objects.append(entry)
    return objects


def to_device(example: Example, device: torch.device) -> Example:
    return Example(*(None if value is None else value.to(device, non_blocking=True) for value in example))  # type: ignore[arg-type]


def _paste(mask: Tensor, box: Tensor, size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """[h, w]: the pixels of an image at which a mask [s, s], spread over the box, is at least 0.5."""
    x, y, right, bottom = box.tolist()
    drawn = np.zeros(size_px[::-1], np.uint8)
    columns, rows = range(int(x), min(math.ceil(right), size_px[0])), range(int(y), min(math.ceil(bottom), size_px[1]))
    across = (torch.arange(columns.start, columns.stop) + 0.5 - x) / (right - x) * 2 - 1
    down = (torch.arange(rows.start, rows.stop) + 0.5 - y) / (bottom - y) * 2 - 1
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)[None]  # [1, h, w, 2] of x, y
    sampled = F.grid_sample(mask[None, None].float(), grid.float(), align_corners=False)[0, 0]
    drawn[rows.start : rows.stop, columns.start : columns.stop] = (sampled >= 0.5).numpy()
    return drawn


def _to_cpu(found: Detections) -> Detections:
    masks = None if found.masks is None else found.masks.cpu()
    return Detections(boxes=found.boxes.cpu(), labels=found.labels.cpu(), scores=found.scores.cpu(), masks=masks)
