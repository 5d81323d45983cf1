"""Frozen features of labelled objects: read, crop, encode, a block of images at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from orl_fast.console import log, progress
from orl_fast.evals.labels import LabelledData, LabelledObjects
from orl_fast.models import Encoder
from orl_fast.shards.images import BadImage, PackedImage, packed_image
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.normalize import normalize
from orl_fast.views.plan import ViewPlan, center_crops, roi_crops

BOX_PADDING = 0.1  # of a box's sides, added on each: edges are part of an object's look
_IMAGES_PER_BLOCK = 64
_CROPS_PER_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of labelled objects.

    Attributes:
        values: [M, D] float32. labels: [M] int64. images: [M] int64, equal for objects of one image.
        num_skipped: images that could not be read; their objects are not among the M.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    images: NDArray[np.int64]
    num_skipped: int


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """Frozen features to learn from and to be scored on."""

    train: Features
    test: Features


def encode_labelled(
    encoder: Encoder, data: LabelledData, *, size_px: int | None = None, device: torch.device | None = None, num_threads: int = 1
) -> LabelledFeatures:
    """Encode both parts of labelled data (see `encode_objects`)."""
    train, test = (
        encode_objects(encoder, objects, size_px=size_px, device=device, num_threads=num_threads) for objects in (data.train, data.test)
    )
    return LabelledFeatures(train=train, test=test)


def encode_objects(
    encoder: Encoder, objects: LabelledObjects, *, size_px: int | None = None, device: torch.device | None = None, num_threads: int = 1
) -> Features:
    """Globally average-pooled backbone features of each object, without augmentation.

    Whole images are resized and cropped at the center, boxes padded by a tenth, cropped and resized to a square, as stage 2 does it.
    Images that cannot be decoded are skipped, counted, and told in the log.

    Args:
        size_px: side of the views; by default the size of stage 2's image crops (for images) or RoIs (for boxes).
        device: where to encode; by default the CPU.
        num_threads: for reading and rendering.
    """
    device = device or torch.device("cpu")
    encoder = encoder.to(device)
    source = _Block()
    values: list[NDArray[np.float32]] = [np.empty((0, encoder.num_features), np.float32)]
    kept: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    bad: list[int] = []
    renderer = CpuRenderer(source, num_threads=num_threads)
    try:
        with ThreadPoolExecutor(num_threads) as pool, progress("encoding", total=len(objects.paths), unit="images") as advance:
            for positions in _blocks(len(objects.paths)):
                packed = list(pool.map(_read, [objects.paths[i] for i in positions]))
                for position, image in zip(positions, packed, strict=True):
                    if isinstance(image, str):
                        bad.append(position)
                        log.warning("%s: skipped, %s", objects.paths[position], image)
                good = np.array([p for p, image in zip(positions, packed, strict=True) if isinstance(image, PackedImage)], np.int64)
                source.images = [image for image in packed if isinstance(image, PackedImage)]
                chosen = np.flatnonzero(np.isin(objects.images, good))
                for members in np.array_split(chosen, range(_CROPS_PER_BATCH, len(chosen), _CROPS_PER_BATCH)):
                    if not len(members):
                        continue
                    rows = np.searchsorted(good, objects.images[members]).astype(np.int64)
                    boxes = None if objects.boxes is None else objects.boxes[members]
                    rendered = renderer.render(_plan(encoder, source.images, rows, boxes, size_px=size_px))
                    lost = np.isin(rows, rendered.bad_rows)
                    bad += np.unique(objects.images[members[lost]]).tolist()
                    values.append(encoder.pooled(normalize(rendered.batches[0].to(device))).float().cpu().numpy())
                    kept.append(members[~lost])
                advance(len(positions))
    finally:
        renderer.close()
    members = np.concatenate(kept)
    num_skipped = len(set(bad))
    return Features(values=np.concatenate(values), labels=objects.labels[members], images=objects.images[members], num_skipped=num_skipped)


def pad_boxes(
    boxes: NDArray[np.float32], *, heights: NDArray[np.int32], widths: NDArray[np.int32], share: float = BOX_PADDING
) -> NDArray[np.float32]:
    """Enlarge boxes [M, 4] xyxy by a share of their sides on each side, within their images [M]."""
    pad_x, pad_y = share * (boxes[:, 2] - boxes[:, 0]), share * (boxes[:, 3] - boxes[:, 1])
    padded = np.stack([boxes[:, 0] - pad_x, boxes[:, 1] - pad_y, boxes[:, 2] + pad_x, boxes[:, 3] + pad_y], axis=1)
    limits = np.stack([widths, heights, widths, heights], axis=1)
    return np.asarray(np.clip(np.rint(padded), 0, limits), np.float32)


class _Block:
    """The images of the block at work, as the renderer's source."""

    def __init__(self) -> None:
        self.images: Sequence[PackedImage] = []

    def view(self, i: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.images[i].jpeg, np.uint8)


def _blocks(count: int) -> Iterator[range]:
    return (range(start, min(start + _IMAGES_PER_BLOCK, count)) for start in range(0, count, _IMAGES_PER_BLOCK))


def _read(path: Path) -> PackedImage | str:
    """The image as shards would hold it, or why it cannot be read."""
    try:
        return packed_image(path.read_bytes())
    except (BadImage, OSError) as error:
        return str(error)


def _plan(
    encoder: Encoder, images: Sequence[PackedImage], rows: NDArray[np.int64], boxes: NDArray[np.float32] | None, *, size_px: int | None
) -> ViewPlan:
    heights = np.array([image.height for image in images], np.int32)
    widths = np.array([image.width for image in images], np.int32)
    mining = encoder.config.mining
    if boxes is None:
        crop_px = size_px or mining.crop_px
        resize_px = round(crop_px * mining.resize_px / mining.crop_px)
        return center_crops(rows, heights=heights, widths=widths, resize_px=resize_px, crop_px=crop_px)
    return roi_crops(rows, pad_boxes(boxes, heights=heights[rows], widths=widths[rows]), size_px=size_px or mining.roi_size_px)
