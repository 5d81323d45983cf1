"""Masks of annotation files: polygons and run lengths, whole or damaged, resized and rotated."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as rle

from orl_fast.evals.detection_masks import as_annotation, bounds, draw_mask, encode_mask, read_mask, rotate_mask

SIZE_PX = (50, 30)  # width, height
BOX_SHAPE = [10.0, 5.0, 30.0, 5.0, 30.0, 20.0, 10.0, 20.0]
TRIANGLE = [35.0, 2.0, 45.0, 2.0, 45.0, 12.0]


def run_lengths(drawn: NDArray[np.uint8]) -> list[int]:
    """Of zeros and ones in turn, zeros first, down the columns."""
    lengths, value = [0], 0
    for pixel in drawn.ravel(order="F").tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


def blobs(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.random(SIZE_PX[::-1]) < rng.choice([0.02, 0.5, 0.98]), np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_of_all_forms_are_the_same_mask(seed: int) -> None:
    drawn = blobs(seed)
    compressed = rle.encode(np.asfortranarray(drawn))["counts"].decode()
    forms = [read_mask({"size": [30, 50], "counts": counts}, size_px=SIZE_PX) for counts in (compressed, run_lengths(drawn))]
    for mask in forms:
        assert mask is not None
        assert np.array_equal(draw_mask(mask, size_px=SIZE_PX), drawn)
        assert encode_mask(drawn) == mask


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, height = rng.integers(5, 300, 2).tolist()
        corners = [rng.uniform(-0.1, 1.1, (rng.integers(3, 30), 2)) * (width, height) for _ in range(2)]
        expected = rle.merge(rle.frPyObjects([points.ravel().tolist() for points in corners], height, width))
        assert encode_mask(draw_mask(tuple(corners), size_px=(width, height)))["counts"] == expected["counts"].decode()


def test_polygons_cover_what_they_enclose() -> None:
    mask = read_mask([BOX_SHAPE, TRIANGLE], size_px=SIZE_PX)
    assert mask is not None
    drawn = draw_mask(mask, size_px=SIZE_PX)
    assert drawn[5:20, 10:30].all()
    assert bounds(mask).tolist() == [10, 2, 45, 20]
    assert as_annotation(mask) == [BOX_SHAPE, TRIANGLE]


@pytest.mark.parametrize(
    ("segmentation", "kept"),
    [
        ([BOX_SHAPE, [1.0, 1.0, 2.0, 2.0]], [BOX_SHAPE]),  # two points; pycocotools would take four numbers for a box
        ([BOX_SHAPE, TRIANGLE[:5]], [BOX_SHAPE]),
        ([BOX_SHAPE, [float("nan"), *TRIANGLE[1:]]], [BOX_SHAPE]),
        ([BOX_SHAPE, [None, *TRIANGLE[1:]], []], [BOX_SHAPE]),
        (BOX_SHAPE, [BOX_SHAPE]),  # not within a list
        ([[[x, y] for x, y in zip(BOX_SHAPE[::2], BOX_SHAPE[1::2], strict=True)]], [BOX_SHAPE]),
    ],
)
def test_what_is_usable_of_polygons_is_kept(segmentation: Any, kept: Any) -> None:
    mask = read_mask(segmentation, size_px=SIZE_PX)
    assert mask is not None
    assert as_annotation(mask) == kept


_COUNTS = rle.encode(np.asfortranarray(blobs(0)))["counts"].decode()


@pytest.mark.parametrize(
    "segmentation",
    [
        None, [], [[]], "polygon", 7, {}, [[1, 2, 3, 4]], [["a"] * 6], [{"size": [30, 50]}],
        {"size": [50, 30], "counts": _COUNTS}, {"size": [30, 50], "counts": _COUNTS[:-2]}, {"size": [30, 50], "counts": ""},
        {"size": [30, 50], "counts": _COUNTS + "zz"}, {"size": [30, 50], "counts": "é"}, {"size": [30, 50], "counts": None},
        {"size": [30, 50], "counts": [1, 2]}, {"size": [30, 50], "counts": [1501, -1]}, {"size": [30, 50], "counts": ["x"]},
    ],
)  # fmt: skip
def test_what_is_no_mask(segmentation: Any) -> None:
    assert read_mask(segmentation, size_px=SIZE_PX) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_rotated_as_pillow_rotates_images(orientation: int) -> None:
    for segmentation in ([BOX_SHAPE], encode_mask(blobs(2))):
        mask = read_mask(segmentation, size_px=SIZE_PX)
        assert mask is not None
        stored = Image.fromarray(draw_mask(mask, size_px=SIZE_PX))
        stored.getexif()[0x0112] = orientation
        upright = ImageOps.exif_transpose(stored)
        rotated = draw_mask(rotate_mask(mask, orientation=orientation, size_px=SIZE_PX), size_px=upright.size)
        assert np.array_equal(rotated, np.asarray(upright))


def test_masks_are_resized_with_their_image() -> None:
    polygons, lengths = read_mask([BOX_SHAPE], size_px=SIZE_PX), encode_mask(draw_mask((np.reshape(BOX_SHAPE, (-1, 2)),), size_px=SIZE_PX))
    assert polygons is not None
    expected = np.zeros((60, 150), np.uint8)
    expected[10:40, 30:90] = 1
    for mask in (polygons, lengths):
        assert np.array_equal(draw_mask(mask, size_px=SIZE_PX, to_px=(150, 60)), expected)
