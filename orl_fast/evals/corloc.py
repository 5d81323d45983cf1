"""Is the best corresponding RoI of an image on an object? Measures stage 2 by itself, without any training.

CorLoc: the share of images whose best-paired RoI, the query box of the most similar pair with any neighbor, overlaps an annotated object
with an IoU of 0.5 or more. Next to it stand what a RoI taken at random and the best RoI of each image reach, and the recall: the share of
objects that some RoI overlaps so.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from orl_fast.boxes import pairwise_iou
from orl_fast.config import Config, Section
from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError
from orl_fast.evals import Context
from orl_fast.files import atomic_folder
from orl_fast.mining.executor import Executor
from orl_fast.mining.objects import OTHER_FRAME, annotated_objects, annotation_files
from orl_fast.mining.pipeline import STEPS, Stage
from orl_fast.models import Encoder
from orl_fast.places import default_shards, mined_folder
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, PairTable, find_table, open_info, table_info, tables_of

SCORES = {"corloc": "CorLoc", "random_roi": "a random RoI", "best_roi": "the best RoI", "recall": "recall of objects"}


class Options(Section):
    """DATA is a shard folder, or its name below shards/, of images with COCO-style annotations. Pairs that CHECKPOINT's encoder mined are
    taken from its mined tables; for any other backbone they are mined, from the same RoIs, into a folder next to evals.jsonl."""

    annotations: Path | None = Field(default=None, description="COCO-style annotation file [default: the one packed from].")
    mined: Path | None = Field(default=None, description="Tables of orl-fast mine [default: SHARDS/mined].")
    min_iou: float = Field(default=0.5, gt=0, le=1, description="Overlap of a RoI that is on an object.")


@dataclass(frozen=True, kw_only=True)
class PackedObjects:
    """The annotated objects of packed images, image by image."""

    boxes: Sequence[NDArray[np.float64]]  # of each image [m, 4] xyxy, pixels
    labels: Sequence[NDArray[np.int64]]  # of each image [m]; -1: of no listed category
    num_skipped_images: int = 0  # annotated images that are not packed, or have another size
    num_skipped_objects: int = 0  # annotations that cannot be used, and objects of those images


def run(encoder: Encoder, data: Path, options: Options, context: Context) -> dict[str, float]:
    index = ShardIndex.open(default_shards(data))
    objects = packed_objects(index, options.annotations)
    rois, pairs = mined_by(encoder, index, options.mined or mined_folder(index.path), context)
    return localization(rois, pairs, objects, min_iou=options.min_iou)


def summary(values: dict[str, float]) -> str:
    return (
        f"{values['num_images']:g} images with {values['num_objects']:g} objects; {values['num_images_without_objects']:g} have none, "
        f"{values['num_skipped_images']:g} images and {values['num_skipped_objects']:g} objects skipped. Best pairs with both RoIs on "
        f"objects of known categories: {values['num_pairs_on_objects']:g}"
    ) + (f"; {100 * values['same_category']:.1f} % of them show one category." if "same_category" in values else ".")


def packed_objects(index: ShardIndex, annotations: Path | None = None) -> PackedObjects:
    """The objects of a dataset's images in one annotation file, or in those it was packed from; as `annotated_objects` reads them.

    DataError as it raises it, or if no packed image has an object.
    """
    boxes = [np.empty((0, 4))] * len(index)
    labels = [np.empty(0, np.int64)] * len(index)
    numbers: dict[str, int] = {}  # of the categories of all files
    num_images = num_objects = 0
    for found in annotated_objects(index, annotation_files(index, annotations)):
        content = found.content
        known = np.array([numbers.setdefault(name, len(numbers)) for name in content.categories] + [-1])
        num_objects += content.num_skipped
        for image, row in enumerate(found.rows.tolist()):
            own = np.clip(found.boxes[image], 0, [index.widths[row], index.heights[row]] * 2) if row >= 0 else found.boxes[image]
            within = ((own[:, 2:] - own[:, :2]) > 0).all(axis=1)
            if row < 0:
                num_images += 1
                num_objects += len(own)
                continue
            first, last = np.searchsorted(content.images, [image, image + 1])
            boxes[row], labels[row] = own[within], known[content.labels[first:last]][within]
            num_objects += int(np.sum(~within))
        if num_resized := int((found.rows == OTHER_FRAME).sum()):
            log.warning("%s: %d images have another size than annotated: skipped", found.file, num_resized)
    if not any(map(len, boxes)):
        raise DataError(f"{index.path}: no packed image has an annotated object; name another file with --annotations")
    return PackedObjects(boxes=boxes, labels=labels, num_skipped_images=num_images, num_skipped_objects=num_objects)


def mined_by(encoder: Encoder, index: ShardIndex, mined: Path, context: Context) -> tuple[BoxTable, PairTable]:
    """RoIs, and the pairs that this encoder finds among them: out of `mined` where it mined them, else mined into `context.work`."""
    for info in tables_of(mined, "pairs"):
        if info.made_from.get("encoder") == encoder.fingerprint and info.made_from.get("index") == index.fingerprint:
            pairs, rois = find_table(mined, "pairs", info.fingerprint), find_table(mined, "rois", info.made_from["rois"])
            if pairs is not None and rois is not None:
                log.info("pairs: %s, mined by this encoder", pairs)
                return BoxTable.open(rois), PairTable.open(pairs)
    if context.work is None:
        raise ConfigError("corloc: pairs have to be mined for this backbone, and there is no folder for them")
    folder = context.work / "mined"
    steps: tuple[str, ...] = STEPS
    if table_info(mined / "rois") is not None:
        open_info(mined / "rois", "rois", made_from={"index": index.fingerprint}, remedy=f"orl-fast mine {index.path}")
        steps = ("features", "neighbors", "pairs")
        if table_info(folder / "rois") is None:
            with atomic_folder(folder / "rois") as copied:
                shutil.copytree(mined / "rois", copied, dirs_exist_ok=True)
    log.info("pairs: none in %s were mined by this encoder; mining them into %s", mined, folder)
    if encoder.projector is None:  # neighbors by its pooled features
        encoder = Encoder(encoder.backbone, nn.Identity(), name=encoder.name, mining=encoder.mining)
    stage = Stage(
        index=index, folder=folder, config=Config(mining=encoder.mining), checkpoint=Path(encoder.name), own_encoder=encoder,
        executor=Executor(device=context.device, num_workers=context.num_threads),
    )  # fmt: skip
    stage.run(steps)
    return BoxTable.open(folder / "rois"), PairTable.open(folder / "pairs")


def localization(rois: BoxTable, pairs: PairTable, objects: PackedObjects, *, min_iou: float = 0.5) -> dict[str, float]:
    """Where the best pair of each image lies. Images without objects do not count.

    Returns "corloc", "random_roi" (the expectation for a RoI taken uniformly), "best_roi", "recall", "same_category" (of the best pairs
    with both RoIs on objects, if any, the share of one category: of each RoI, the object it overlaps most), all 0 to 1, and counts.
    """
    counted = [image for image, boxes in enumerate(objects.boxes) if len(boxes)]
    overlaps = {image: pairwise_iou(rois.of(image), objects.boxes[image]) for image in counted}  # [R, m]
    hits, shares, any_hit, same = [], [], [], []
    num_found = 0
    for image, iou in overlaps.items():
        on_object = iou.max(axis=1) >= min_iou
        num_found += int((iou.max(axis=0) >= min_iou).sum())
        first = pairs.first[image]
        slot = int(np.argmax(pairs.similarities[first]))  # a neighbor's first pair is its best
        query, partner, neighbor = pairs.query_roi[first[slot]], pairs.partner_roi[first[slot]], int(pairs.neighbors[image, slot])
        hits.append(on_object[query])
        shares.append(on_object.mean())
        any_hit.append(on_object.any())
        if on_object[query] and neighbor in overlaps and overlaps[neighbor][partner].max() >= min_iou:
            label, other = (objects.labels[i][overlaps[i][roi].argmax()] for i, roi in ((image, query), (neighbor, partner)))
            if min(label, other) >= 0:
                same.append(label == other)
    num_objects = sum(len(objects.boxes[image]) for image in counted)
    return {
        "corloc": float(np.mean(hits)),
        "random_roi": float(np.mean(shares)),
        "best_roi": float(np.mean(any_hit)),
        "recall": num_found / num_objects,
        **({"same_category": float(np.mean(same))} if same else {}),
        "num_images": len(counted),
        "num_objects": num_objects,
        "num_images_without_objects": len(objects.boxes) - len(counted),
        "num_pairs_on_objects": len(same),
        "num_skipped_images": objects.num_skipped_images,
        "num_skipped_objects": objects.num_skipped_objects,
    }
