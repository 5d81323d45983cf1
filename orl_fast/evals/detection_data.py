"""Images with annotated objects for detection: what can be used of an annotation file, and batches of a training."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from orl_fast.coco import Annotations, Id, Skipped, is_crowd, read_annotations, rotate_boxes, warn_skipped
from orl_fast.console import log, progress
from orl_fast.distributed import broadcast_value
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.detection_masks import Mask, as_annotation, bounds, draw_mask, rotate_mask
from orl_fast.evals.detection_masks import read_mask as _read_mask
from orl_fast.philox import uniform
from orl_fast.shards.images import BadImage, decode_rgb, packed_image

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")
_MAX_OUTSIDE = 0.2  # share of the objects that may reach out of their image
_MAX_MASKLESS = 0.1  # share of the objects that may lack a mask where others have one
_FEW = 10  # objects: so many and fewer cost a file only where they are more than half of it
_SLACK_PX = 2.0
_MIN_SIDE_PX = 0.01  # of objects to train on: sides are divided by, and their logarithms are learned
_HEADERS_AT_ONCE = 256
_STREAM = 20  # of the random draws; views have 1 to 15


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionData:
    """Images and their objects, all in the frame of the upright image."""

    annotations: Path
    paths: tuple[Path, ...]  # of the N images
    image_ids: NDArray[np.int64]  # [N]
    sizes_px: NDArray[np.int64]  # [N, 2] width and height
    plain: NDArray[np.bool_]  # [N] False where decoding takes more than a JPEG decoder: rotation, transparency, other formats
    images: NDArray[np.int64]  # [M] ascending, object m is in image images[m]
    boxes: NDArray[np.float64]  # [M, 4] xyxy, pixels
    labels: NDArray[np.int64]  # [M] positions in `categories`
    crowds: NDArray[np.bool_]  # [M]
    areas: NDArray[np.float64]  # [M] pixels
    masks: tuple[Mask, ...] | None  # [M]; None where no object has one, or none are wanted
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    num_skipped_images: int = 0  # listed, but not to be used
    num_skipped_objects: int = 0

    def members(self, image: int) -> range:
        """The objects of one image."""
        first, last = np.searchsorted(self.images, [image, image + 1])
        return range(first, last)

    def of_images(self, chosen: NDArray[np.int64]) -> "DetectionData":
        """These images alone, given by ascending positions, with their objects."""
        return self._of_objects(np.isin(self.images, chosen), chosen)

    def for_training(self) -> "DetectionData":
        """Without crowds, and without images that have no other object, as Detectron2 trains; and without objects of no visible width."""
        inside = np.clip(self.boxes, 0, np.tile(self.sizes_px[self.images], 2))
        thin = ~self.crowds & ((inside[:, 2:] - inside[:, :2]).min(axis=1, initial=np.inf) < _MIN_SIDE_PX)
        if num_thin := int(thin.sum()):
            log.warning("%s: %d objects are less than %g px wide or high: not trained on", self.annotations, num_thin, _MIN_SIDE_PX)
        kept = ~self.crowds & ~thin
        return replace(self._of_objects(kept, np.unique(self.images[kept])), num_skipped_objects=self.num_skipped_objects + num_thin)

    def without_masks(self) -> "DetectionData":
        return replace(self, masks=None)

    def as_coco(self) -> dict[str, Any]:
        """What is evaluated, as the content of a COCO annotation file; objects are numbered from 1 (0 would never be matched)."""
        names = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.categories, strict=True)]
        sizes = zip(self.image_ids.tolist(), self.paths, self.sizes_px.tolist(), strict=True)
        images = [{"id": i, "file_name": path.name, "width": width, "height": height} for i, path, (width, height) in sizes]
        corner_size = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1).tolist()
        objects = [
            {
                "id": m + 1,
                "image_id": int(self.image_ids[self.images[m]]),
                "category_id": self.category_ids[self.labels[m]],
                "bbox": corner_size[m],
                "area": float(self.areas[m]),
                "iscrowd": int(self.crowds[m]),
                **({} if self.masks is None else {"segmentation": as_annotation(self.masks[m])}),
            }
            for m in range(len(self.images))
        ]
        return {"images": images, "annotations": objects, "categories": names}

    def _of_objects(self, kept: NDArray[np.bool_], images: NDArray[np.int64]) -> "DetectionData":
        return replace(
            self,
            paths=tuple(self.paths[i] for i in images.tolist()),
            image_ids=self.image_ids[images],
            sizes_px=self.sizes_px[images],
            plain=self.plain[images],
            images=np.searchsorted(images, self.images[kept]).astype(np.int64),
            boxes=self.boxes[kept],
            labels=self.labels[kept],
            crowds=self.crowds[kept],
            areas=self.areas[kept],
            masks=None if self.masks is None else tuple(self.masks[m] for m in np.flatnonzero(kept).tolist()),
        )


def open_detection_data(annotations: Path, images: Path, *, masks: bool, context: Context) -> DetectionData:
    """Read an annotation file and the headers of its images; what cannot be used is skipped, counted and named.

    Skipped: images that are missing, no image files, or of another size than annotated; objects as `read_annotations` does, of unknown
    categories, outside of their image, or without a usable mask (with `masks`, unless no object has one). Where EXIF rotates an image that
    is annotated as stored, its objects are rotated with it.

    Raises:
        DataError: not a COCO-style annotation file; no image or object is left; boxes or masks are, on the whole, not what they should be.
    """
    found = read_annotations(annotations, complete=True)
    folder = images.resolve()
    paths = tuple(folder / name for name in found.file_names)
    headers = broadcast_value(_headers(paths, context) if context.ranks.is_main else None, context.ranks)
    skipped = Skipped(list)
    usable, rotations = _usable_images(found, headers, skipped)
    num_skipped_images = len(paths) - int(usable.sum())
    if not usable.any():
        reasons = "; ".join(f"{len(names)} {what}" for what, names in skipped.items()) or "it lists none"
        raise DataError(
            f"{annotations}: none of its images can be used ({reasons}); they are looked for in {images}, which has to be the folder that "
            f"their names start from{_elsewhere(found.file_names, folder)}"
        )
    objects, num_rotated = _objects(found, headers, rotations, skipped, usable=usable, with_masks=masks, path=annotations)
    warn_skipped(annotations, skipped)
    if num_rotated:
        log.warning("%s: %d images are stored rotated (EXIF): their boxes and masks are rotated with them", annotations, num_rotated)
    if not objects:
        what = f"none of its {len(found.images)} objects can be used" if len(found.images) else "has no annotated objects"
        raise DataError(f"{annotations}: {what}; give another file")
    if masks and objects[0].mask is None:
        log.warning("%s: no object has a mask that can be used", annotations)
    image_ids = found.image_ids if _numbers(found.image_ids) else range(len(paths))
    category_ids = found.category_ids if _numbers(found.category_ids) else range(1, len(found.categories) + 1)
    upright = np.array([(0, 0) if isinstance(header, str) else header.upright_px for header in headers], np.int64).reshape(-1, 2)
    num_listed = len(found.images) + found.num_skipped
    whole = DetectionData(
        annotations=annotations,
        paths=paths,
        image_ids=np.array(image_ids, np.int64),
        sizes_px=upright,
        plain=np.array([not isinstance(header, str) and header.plain for header in headers], np.bool_),
        images=np.array([each.image for each in objects], np.int64),
        boxes=np.array([each.box for each in objects], np.float64).reshape(-1, 4),
        labels=np.array([each.label for each in objects], np.int64),
        crowds=np.array([each.crowd for each in objects], np.bool_),
        areas=np.array([each.area for each in objects], np.float64),
        masks=tuple(each.mask for each in objects if each.mask is not None) if objects[0].mask is not None else None,
        categories=found.categories,
        category_ids=tuple(int(key) for key in category_ids),
        num_skipped_images=num_skipped_images,
        num_skipped_objects=num_listed - len(objects),
    )
    return whole.of_images(np.flatnonzero(usable))


class Example(NamedTuple):
    """An image [3, H, W] uint8, RGB, resized, with its objects: boxes [m, 4] float32 xyxy, labels [m] from 1 (0 is the background)."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None  # [m, H, W] uint8


def resized_px(size_px: tuple[int, int], *, short_px: int, max_px: int) -> tuple[int, int]:
    """Width and height of an image resized to a shorter side, unless the longer one would exceed `max_px` (Detectron2)."""
    scale = short_px / min(size_px)
    scale *= min(1.0, max_px / (scale * max(size_px)))
    return int(size_px[0] * scale + 0.5) or 1, int(size_px[1] * scale + 0.5) or 1


def load_example(data: DetectionData, image: int, *, short_px: int, max_px: int, flip: bool = False) -> Example | str:
    """Decode, resize and flip an image with its objects. The reason, if it cannot be decoded."""
    path, size_px = data.paths[image], (int(data.sizes_px[image, 0]), int(data.sizes_px[image, 1]))
    try:
        content = path.read_bytes()
        decoded = decode_rgb(content if data.plain[image] else packed_image(content).jpeg)
    except (BadImage, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"cannot be decoded ({error or type(error).__name__})"
    if decoded.size != size_px:
        return f"{decoded.width} × {decoded.height} px, where its header says {size_px[0]} × {size_px[1]}"
    to_px = resized_px(size_px, short_px=short_px, max_px=max_px)
    pixels = np.asarray(decoded.resize(to_px, Image.Resampling.BILINEAR))
    members = data.members(image)
    boxes = np.clip(data.boxes[members.start : members.stop], 0, np.tile(size_px, 2)) * np.tile(np.divide(to_px, size_px), 2)
    drawn = None
    if data.masks is not None:
        drawn = np.array([draw_mask(data.masks[m], size_px=size_px, to_px=to_px) for m in members], np.uint8).reshape(-1, *to_px[::-1])
    if flip:
        pixels, boxes[:, [0, 2]] = pixels[:, ::-1], to_px[0] - boxes[:, [2, 0]]
        drawn = None if drawn is None else drawn[..., ::-1]
    return Example(
        image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        labels=torch.from_numpy(data.labels[members.start : members.stop] + 1),
        masks=None if drawn is None else torch.from_numpy(np.ascontiguousarray(drawn)),
    )


def batches_of_steps(data: DetectionData, *, num_steps: int, batch_size: int, world_size: int, seed: int) -> NDArray[np.int64]:
    """[num_steps, world_size, batch_size / world_size]: the images of each step and rank.

    All images in random order, another one in each epoch. Images that lie and images that stand are collected apart; a rank's part is
    complete as soon as one kind fills it, so that little is padded (Detectron2's aspect ratio grouping). A pure function of its arguments.
    """
    per_rank = batch_size // world_size
    num_needed = num_steps * batch_size + 2 * per_rank
    epochs = -(-num_needed // len(data.paths))
    orders = [np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(data.paths)) for epoch in range(epochs)]
    stream = np.concatenate(orders)[:num_needed]
    lying = (data.sizes_px[:, 0] > data.sizes_px[:, 1])[stream]
    parts = []  # positions in the stream, the last of which completes the part
    for kind in (lying, ~lying):
        places = np.flatnonzero(kind)
        parts.append(places[: len(places) // per_rank * per_rank].reshape(-1, per_rank))
    complete = np.concatenate(parts)
    ordered = complete[np.argsort(complete[:, -1])][: num_steps * world_size]
    return np.asarray(stream[ordered].reshape(num_steps, world_size, per_rank), np.int64)


def training_examples(
    data: DetectionData, batches: NDArray[np.int64], *, first_step: int, sizes_px: tuple[int, ...], max_px: int, seed: int, context: Context
) -> Iterator[list[Example]]:
    """A rank's examples of each step, loaded ahead; their sizes and flips are functions of seed, step and place in the global batch.

    An image that cannot be decoded is left out and named, once. DataError if a rank's part has no other.
    """
    num_steps, _, per_rank = batches.shape
    named: set[int] = set()

    def load(place: tuple[int, int]) -> Example | str:
        step, i = place
        slot = context.ranks.rank * per_rank + i
        flip, size = (float(uniform(seed, step, slot, _STREAM, draw)) for draw in (0, 1))
        short_px = sizes_px[int(size * len(sizes_px))]
        return load_example(data, int(batches[step, context.ranks.rank, i]), short_px=short_px, max_px=max_px, flip=flip < 0.5)

    places = ((step, i) for step in range(first_step, num_steps) for i in range(per_rank))
    with ThreadPoolExecutor(context.num_threads) as pool:
        loaded = ahead(pool, load, places, depth=2 * per_rank + context.num_threads)
        for step in range(first_step, num_steps):
            examples: list[Example] = []
            for image, found in zip(batches[step, context.ranks.rank].tolist(), islice(loaded, per_rank), strict=True):
                if not isinstance(found, str):
                    examples.append(found)
                elif image not in named:
                    named.add(image)
                    log.warning("%s: left out of the training, %s", data.paths[image], found)
            if not examples:
                raise DataError(f"{data.annotations}: no image of step {step} can be decoded; remove such images, or use larger batches")
            yield examples


def ahead(pool: Executor, function: Callable[[_Item], _Value], items: Iterable[_Item], *, depth: int) -> Iterator[_Value]:
    """Like `map`, in order, with up to `depth` items in work ahead of the consumer."""
    waiting: deque[Future[_Value]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _elsewhere(file_names: tuple[str, ...], folder: Path) -> str:
    """Where images are found after all: names may hold the folder's own ("val2017/000000000139.jpg")."""
    found = [name for name in file_names[:1] if (folder.parent / name).is_file()]
    return f"; {found[0]} is in {folder.parent}, so name that one" if found else ""


def _numbers(ids: Iterable[Id]) -> bool:
    """Whether ids can stay as they are in results; positions take their place otherwise."""
    return all(isinstance(key, int) and key >= 0 for key in ids)


class _Header(NamedTuple):
    stored_px: tuple[int, int]  # width and height
    orientation: int  # EXIF's
    plain: bool

    @property
    def upright_px(self) -> tuple[int, int]:
        return self.stored_px[::-1] if self.orientation >= 5 else self.stored_px


class _Object(NamedTuple):
    image: int
    label: int
    box: NDArray[np.float64]
    crowd: bool
    area: float
    mask: Mask | None


def _headers(paths: tuple[Path, ...], context: Context) -> list[_Header | str]:
    """Of each image its header, or why it cannot be used."""
    found: list[_Header | str] = []
    with ThreadPoolExecutor(context.num_threads) as pool, progress("reading headers", total=len(paths), unit="images") as advance:
        for start in range(0, len(paths), _HEADERS_AT_ONCE):
            found += pool.map(_header, paths[start : start + _HEADERS_AT_ONCE])
            advance(len(found) - start)
    return found


def _header(path: Path) -> _Header | str:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
            orientation = orientation if orientation in range(2, 9) else 1
            plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and orientation == 1
            return _Header((image.width, image.height), orientation, plain)
    except FileNotFoundError:
        return "images that are not there"
    except Exception:  # decoders raise anything at all on garbage
        return "images that cannot be read"


def _usable_images(found: Annotations, headers: list[_Header | str], skipped: Skipped) -> tuple[NDArray[np.bool_], list[int]]:
    """Which images can be used, and how the objects of each are to be rotated (an EXIF orientation, 1 for not at all)."""
    usable, rotations = np.ones(len(headers), np.bool_), []
    for i, (header, annotated) in enumerate(zip(headers, found.sizes_px.tolist(), strict=True)):
        rotation = 1
        if isinstance(header, str):
            usable[i] = False
            skipped[header].append(found.file_names[i])
        elif tuple(annotated) in (header.stored_px, (0, 0)):
            rotation = header.orientation
        elif tuple(annotated) != header.upright_px:
            usable[i] = False
            skipped["images of another size than annotated"].append(found.file_names[i])
        rotations.append(rotation)
    return usable, rotations


def _objects(
    found: Annotations, headers: list[_Header | str], rotations: list[int], skipped: Skipped, *,
    usable: NDArray[np.bool_], with_masks: bool, path: Path,
) -> tuple[list[_Object], int]:  # fmt: skip
    """The objects that can be used, with a mask each or none at all, and the number of images whose objects were rotated."""
    objects: list[_Object] = []
    maskless: list[int] = []  # positions in `objects`
    reaching: list[str] = []
    num_checked = num_corners = 0
    for m, (image, label, entry) in enumerate(zip(found.images.tolist(), found.labels.tolist(), found.entries, strict=True)):
        name = f"id {entry['id']}" if "id" in entry else f"number {m}"
        header, box = headers[image], found.boxes[m]
        if not usable[image] or isinstance(header, str):
            continue
        width, height = frame_px = header.upright_px if rotations[image] == 1 else header.stored_px
        inside = np.clip(box, 0, [width, height] * 2)
        if label < 0:
            skipped["objects of categories that are not listed, or share their id with others"].append(name)
            continue
        num_checked += 1
        if (box[:2] < -_SLACK_PX).any() or (box[2:] - [width, height] > _SLACK_PX + 0.01 * max(frame_px)).any():
            reaching.append(name)
        if (inside[2:] <= inside[:2]).any():
            skipped["objects outside of their images"].append(name)
            continue
        mask = _read_mask(entry.get("segmentation"), size_px=frame_px) if with_masks else None
        if mask is not None and not is_crowd(entry):
            num_corners += _is_corners(box, bounds(mask))
        if mask is not None and not _near(bounds(mask), box):
            mask = None
        area = entry.get("area")
        if not (isinstance(area, int | float) and 0 <= area <= width * height):
            area = (box[2] - box[0]) * (box[3] - box[1]) if mask is None else draw_mask(mask, size_px=frame_px).sum()
        if mask is None:
            maskless.append(len(objects))
        elif rotations[image] > 1:
            mask = rotate_mask(mask, orientation=rotations[image], size_px=frame_px)
        if rotations[image] > 1:
            box = rotate_boxes(box[None], orientation=rotations[image], size_px=frame_px)[0]
        objects.append(_Object(image, label, box, is_crowd(entry), float(area), mask))
    if 2 * num_corners > num_checked:
        raise DataError(
            f"{path}: {num_corners} of {num_checked} boxes are [left, top, right, bottom], as their masks show; give boxes as [x, y, "
            "width, height]"
        )
    if _too_many(len(reaching), num_checked, _MAX_OUTSIDE):
        raise DataError(
            f"{path}: {len(reaching)} of {num_checked} boxes reach out of their images, for example {reaching[0]}: they are in another "
            "frame, or not [x, y, width, height]; give boxes in pixels of the image files"
        )
    if with_masks and len(maskless) < len(objects):
        if _too_many(len(maskless), len(objects), _MAX_MASKLESS):
            raise DataError(
                f"{path}: {len(maskless)} of {len(objects)} objects have no mask that can be used; --no-masks detects boxes alone"
            )
        for position in maskless:
            skipped["objects without a mask that can be used"].append(f"of image {found.file_names[objects[position].image]}")
        objects = [each for each in objects if each.mask is not None]
    rotated = {each.image for each in objects if rotations[each.image] > 1}
    return objects, len(rotated)


def _too_many(num: int, num_all: int, share: float) -> bool:
    """Whether so many odd objects show that the file is wrong as a whole: more than a share of many, more than half of a few."""
    return num > share * num_all and (num > _FEW or 2 * num > num_all)


def _is_corners(box: NDArray[np.float64], mask: NDArray[np.float64]) -> bool:
    """Whether a box read as [x, y, width, height] was written as [left, top, right, bottom]: the mask ends there."""
    written = box - [0, 0, box[0], box[1]]
    return bool(np.abs(written - mask).max() <= _SLACK_PX < np.abs(box - mask).max())


def _near(mask: NDArray[np.float64], box: NDArray[np.float64]) -> bool:
    """Whether two boxes xyxy touch: a mask elsewhere is in another frame, for example shares of the image's sides."""
    return bool((np.minimum(mask[2:], box[2:]) + 1 >= np.maximum(mask[:2], box[:2])).all())
