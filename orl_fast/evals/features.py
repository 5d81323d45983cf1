"""Frozen features of labelled objects: image files are read, cropped and encoded, a bounded number at a time."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from orl_fast.coco import rotate_boxes
from orl_fast.config import LoaderConfig
from orl_fast.console import log, progress
from orl_fast.encode import bounded, encode
from orl_fast.evals import Context
from orl_fast.evals.labels import LabelledOptions, Objects, labelled_data
from orl_fast.files import human_bytes, require_free_space
from orl_fast.memory import available_memory
from orl_fast.models import Encoder
from orl_fast.shards.images import BadImage, PackedImage, packed_image
from orl_fast.views.choose import open_renderer
from orl_fast.views.plan import ViewPlan, center_crops, roi_crops

BOX_PADDING = 0.1  # of a box's sides, added on each: edges are part of an object's look
_IMAGES_PER_BLOCK = 64
_CROPS_PER_BATCH = 256
_MEMORY_SHARE = 0.25  # of the available memory that features may take
_CPU = Context(device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of labelled objects."""

    values: NDArray[np.float32]  # [M, D]
    labels: NDArray[np.int64]  # [M]
    images: NDArray[np.int64]  # [M] equal for objects of one image
    num_skipped_images: int = 0  # what is not among them since it could not be used
    num_skipped_objects: int = 0


def encode_labelled(encoder: Encoder, data: Path, options: LabelledOptions, context: Context) -> tuple[Features, Features]:
    """Features to learn from, and to test on."""
    chosen: dict[str, Any] = {"size_px": options.size_px, "renderer": options.renderer, "context": context}
    train, test = (encode_objects(encoder, objects, **chosen) for objects in labelled_data(data, options, context))
    return train, test


def encode_objects(
    encoder: Encoder, objects: Objects, *, size_px: int | None = None, renderer: str = "cpu", context: Context = _CPU
) -> Features:
    """Globally average-pooled backbone features of each object, without augmentation.

    Whole images are resized and cropped at the center, boxes padded by a tenth, cropped and resized to a square, as stage 2 does it.
    Boxes of images that EXIF rotates are rotated with them. Images that cannot be decoded, or have another size than annotated, and boxes
    outside of their images are skipped, counted and logged.

    `size_px` is the side of the views; by default the size of stage 2's image crops (for images) or RoIs (for boxes). `renderer`: see
    `open_renderer`. ConfigError if the backbone takes no views of that size.
    """
    size_px = size_px or (encoder.mining.crop_px if objects.boxes is None else encoder.mining.roi_size_px)
    encoder.backbone.require_size(size_px, setting="side of the views (--size)")
    device, num_threads, resize_px = context.device, context.num_threads, round(size_px * encoder.mining.resize_px / encoder.mining.crop_px)

    def plan(members: NDArray[np.int64]) -> ViewPlan:
        rows, (widths, heights) = objects.images[members], source.sizes_px.T
        if source.boxes is None:
            return center_crops(rows, heights=heights, widths=widths, resize_px=resize_px, crop_px=size_px)
        return roi_crops(rows, pad_boxes(source.boxes[members], sizes_px=source.sizes_px[rows]), size_px=size_px)

    with (
        closing(_Files(objects, num_threads)) as source,
        closing(open_renderer(renderer, source, LoaderConfig(), device=device, num_threads=num_threads)) as drawn,
        progress("encoding", total=len(objects.paths), unit="images") as advance,
    ):
        plans = ((None, plan(members)) for members in source.blocks(advance))
        encoded = encode(encoder.to(device).pooled, drawn, plans, batch_size=_CROPS_PER_BATCH, device=device, skip=source.skip)
        values, num = feature_array((len(objects), encoder.num_features), folder=context.work), 0
        for _, batch in encoded:
            values[num : num + len(batch)] = batch
            num += len(batch)
    kept = source.usable & ~source.skipped[objects.images]
    return Features(
        values=values[:num],
        labels=objects.labels[kept],
        images=objects.images[kept],
        num_skipped_images=objects.num_skipped_images + int(source.skipped.sum()),
        num_skipped_objects=objects.num_skipped_objects + int(np.sum(~source.usable)),
    )


def feature_array(shape: tuple[int, int], *, folder: Path | None) -> NDArray[np.float32]:
    """An array for features: in memory, or, where it would take much of that, in a file of `folder` that vanishes with the array.

    DataError: the disk is too small for it.
    """
    num_bytes, folder = 4 * shape[0] * shape[1], folder or Path(tempfile.gettempdir())
    if num_bytes <= _MEMORY_SHARE * available_memory():
        return np.empty(shape, np.float32)
    require_free_space(folder, num_bytes=num_bytes, purpose="features")
    log.info("%s of features are kept in a temporary file in %s", human_bytes(num_bytes), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def pad_boxes(boxes: NDArray[np.float32], *, sizes_px: NDArray[np.int32], share: float = BOX_PADDING) -> NDArray[np.float32]:
    """Enlarge boxes [M, 4] xyxy by a share of their sides on each side, within their images, whose width and height are [M, 2]."""
    pad = share * (boxes[:, 2:] - boxes[:, :2])
    padded = np.concatenate([boxes[:, :2] - pad, boxes[:, 2:] + pad], axis=1)
    return np.asarray(np.clip(np.rint(padded), 0, np.tile(sizes_px, 2)), np.float32)


class _Files:
    """The images of labelled objects as a renderer's source; those of the present block are held."""

    def __init__(self, objects: Objects, num_threads: int) -> None:
        self.objects = objects
        self.boxes = None if objects.boxes is None else objects.boxes.copy()  # in upright images as far as they have been read
        self.sizes_px = np.zeros((len(objects.paths), 2), np.int32)  # width and height of these
        self.skipped = np.zeros(len(objects.paths), np.bool_)  # images that cannot be used
        self.usable = np.ones(len(objects), np.bool_)  # False for objects outside of their image
        self._jpegs: dict[int, NDArray[np.uint8]] = {}
        self._pool = ThreadPoolExecutor(num_threads)

    def views(self, rows: NDArray[np.int64], /) -> list[NDArray[np.uint8]]:
        return [self._jpegs[row] for row in rows.tolist()]

    def close(self) -> None:
        self._pool.shutdown()

    def skip(self, rows: NDArray[np.int64], reason: str = "cannot be decoded") -> None:
        for row in np.unique(rows).tolist():
            log.warning("%s: skipped, %s", self.objects.paths[row], reason)
        self.skipped[rows] = True

    def blocks(self, advance: Callable[[int], None]) -> Iterator[NDArray[np.int64]]:
        """Read images block by block; gives the objects of each."""
        paths, num_objects = self.objects.paths, np.bincount(self.objects.images, minlength=len(self.objects.paths))
        num_rotated = 0
        for start in range(0, len(paths), _IMAGES_PER_BLOCK):
            block = range(start, min(start + _IMAGES_PER_BLOCK, len(paths)))
            num_bytes, orientations = np.array(list(self._pool.map(_header, paths[start : block.stop]))).T
            for images in bounded(block, num_crops=num_objects[block], num_bytes=num_bytes, max_crops=_CROPS_PER_BATCH):
                self._jpegs.clear()
                for image, found in zip(images, self._pool.map(_read, paths[images.start : images.stop]), strict=True):
                    num_rotated += self._take(image, found, orientation=int(orientations[image - start]))
                first, last = np.searchsorted(self.objects.images, [images.start, images.stop])
                members = np.arange(first, last)
                members = members[self.usable[first:last] & ~self.skipped[self.objects.images[first:last]]]
                if len(members):
                    yield members
            advance(len(block))
        if num_rotated:
            log.warning("%d images are stored rotated (EXIF): their boxes are rotated with them", num_rotated)
        if num_outside := int(np.sum(~self.usable)):
            log.warning("%d boxes lie outside of their images: skipped", num_outside)

    def _take(self, image: int, found: PackedImage | str, *, orientation: int) -> bool:
        """Hold an image, and place its boxes; says whether they had to be rotated."""
        if isinstance(found, str):
            self.skip(np.array([image]), found)
            return False
        self._jpegs[image] = np.frombuffer(found.jpeg, np.uint8)
        self.sizes_px[image] = width, height = found.width, found.height
        if self.boxes is None or self.objects.sizes_px is None:
            return False
        members = slice(*np.searchsorted(self.objects.images, [image, image + 1]))
        stored, annotated = (height, width) if orientation >= 5 else (width, height), tuple(self.objects.sizes_px[image].tolist())
        rotated = orientation > 1 and annotated in (stored, (0, 0))  # else they are annotated upright
        if rotated:
            self.boxes[members] = rotate_boxes(self.boxes[members], orientation=orientation, size_px=stored)
        elif annotated not in ((width, height), (0, 0)):
            self.skip(np.array([image]), f"{width} × {height} px, annotated as {annotated[0]} × {annotated[1]} px")
        inside = np.clip(self.boxes[members], 0, [width, height] * 2)
        self.usable[members] = (inside[:, 2:] - inside[:, :2]).min(axis=1, initial=np.inf) >= 1
        return rotated


def _header(path: Path) -> tuple[int, int]:
    """Bytes when decoded, and EXIF orientation; `_read` gives the reason if it is not an image."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
            return 3 * image.width * image.height, orientation if orientation in range(2, 9) else 1
    except Exception:  # decoders raise anything at all on garbage
        return 0, 1


def _read(path: Path) -> PackedImage | str:
    """The image as shards would hold it, or why it cannot be read."""
    try:
        return packed_image(path.read_bytes())
    except (BadImage, OSError) as error:
        return str(error)
