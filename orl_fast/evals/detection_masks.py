"""Instance masks of COCO-style annotations: polygons, or run lengths (RLE)."""

from typing import Any

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray
from PIL import Image

from orl_fast.coco import rotate_points

Polygons = tuple[NDArray[np.float64], ...]  # each [P, 2], three points or more
RunLengths = dict[str, Any]  # "size" [height, width], "counts": compressed
Mask = Polygons | RunLengths
_MIN_POINTS = 3


def read_mask(segmentation: Any, *, size_px: tuple[int, int]) -> Mask | None:
    """The mask that an annotation has on an image of width × height `size_px`.

    Polygons of fewer than three points, or with numbers that are missing or not finite, are left out, as Detectron2 does. None if nothing
    is left, or run lengths are damaged or of another size.
    """
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation, size_px)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    return tuple(polygon for part in parts if (polygon := _polygon(part)) is not None) or None


def bounds(mask: Mask) -> NDArray[np.float64]:
    """[4]: xyxy of the smallest box around the mask."""
    if isinstance(mask, dict):
        x, y, width, height = rle.toBbox(mask)
        return np.array([x, y, x + width, y + height])
    points = np.concatenate(mask)
    return np.concatenate([points.min(0), points.max(0)])


def draw_mask(mask: Mask, *, size_px: tuple[int, int], to_px: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """[h, w] of zeros and ones: the mask of an image of width × height `size_px`, as it is when the image is resized to `to_px`."""
    width, height = to_px or size_px
    if isinstance(mask, dict):
        drawn: NDArray[np.uint8] = rle.decode(mask)
        return drawn if to_px in (None, size_px) else np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.NEAREST))
    scale = np.array([width, height]) / size_px
    drawn = rle.decode(rle.merge(rle.frPyObjects([(points * scale).ravel().tolist() for points in mask], height, width)))
    return drawn


def encode_mask(drawn: NDArray[Any]) -> RunLengths:
    """Compressed run lengths of [h, w], as text that JSON can hold."""
    encoded = rle.encode(np.asfortranarray(drawn, np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def rotate_mask(mask: Mask, *, orientation: int, size_px: tuple[int, int]) -> Mask:
    """The mask of an image stored as width × height `size_px`, on the upright one; `orientation`: EXIF's, 1 to 8."""
    if not isinstance(mask, dict):
        return tuple(rotate_points(points, orientation=orientation, size_px=size_px) for points in mask)
    drawn = draw_mask(mask, size_px=size_px)
    if orientation in (2, 3, 7, 8):
        drawn = drawn[:, ::-1]
    if orientation in (3, 4, 6, 7):
        drawn = drawn[::-1]
    return encode_mask(drawn.T if orientation >= 5 else drawn)


def as_annotation(mask: Mask) -> Any:
    """The value of "segmentation" in an annotation file."""
    return mask if isinstance(mask, dict) else [points.ravel().tolist() for points in mask]


def _polygon(points: Any) -> NDArray[np.float64] | None:
    try:
        values = np.array(points, np.float64).ravel()
    except (TypeError, ValueError):
        return None
    usable = len(values) >= 2 * _MIN_POINTS and len(values) % 2 == 0 and np.isfinite(values).all()
    return values.reshape(-1, 2) if usable else None


def _run_lengths(value: RunLengths, size_px: tuple[int, int]) -> RunLengths | None:
    size, counts = value.get("size"), value.get("counts")
    width, height = size_px
    try:
        lengths = _lengths(counts) if isinstance(counts, str) else [int(length) for length in counts]  # type: ignore[union-attr]
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    # The decoder does not miss what is missing at the end.
    if size != [height, width] or min(lengths, default=-1) < 0 or sum(lengths) != width * height:
        return None
    encoded = rle.frPyObjects({"size": size, "counts": lengths}, height, width)
    return {"size": size, "counts": encoded["counts"].decode()}


def _lengths(text: str) -> list[int]:
    """The run lengths that COCO's text stands for: groups of five bits, the least first, as differences to the length but one before."""
    lengths: list[int] = []
    groups = iter(text.encode())
    for group in groups:
        value, bits = 0, 0
        while True:
            value |= (group - 48 & 0x1F) << bits
            bits += 5
            if not group - 48 & 0x20:
                break
            group = next(groups, 48)
        if group - 48 & 0x10:
            value -= 1 << bits
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
    return lengths
