"""The shared segmentation of three scales against OpenCV's of each, and its sort and derivatives against plain ones."""

import cv2
import numpy as np
import pytest
from drawn_photos import draw_flat, draw_photo
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.selective_search.descriptors import derivatives
from orl_fast.selective_search.scratch import Scratch
from orl_fast.selective_search.segmentation import MIN_SIZE_PX, SCALES, _sort_edges, segment


def _check(image: np.ndarray, scratch: Scratch) -> None:
    atoms, regions = segment(image, scratch)
    for k, region_of_atom in zip(SCALES, regions, strict=True):
        expected = cv2.ximgproc.segmentation.createGraphSegmentation(float(np.float32(0.8)), k, MIN_SIZE_PX).processImage(image)
        np.testing.assert_array_equal(region_of_atom[atoms], expected)
    assert len(np.unique(regions, axis=1).T) == len(regions[0])  # atoms are distinct triples


@pytest.mark.parametrize("conversion", [cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2LAB])
def test_equals_opencvs_graph_segmentation(conversion: int) -> None:
    scratch = Scratch()
    for seed, width, height in ((4, 380, 290), (9, 250, 190)):  # a smaller image after a larger one, in the same buffers
        _check(cv2.cvtColor(draw_photo(seed, width=width, height=height), conversion), scratch)


@pytest.mark.parametrize("shape", [(60, 90), (1, 300), (300, 1)])
def test_equals_opencvs_graph_segmentation_on_noise(shape: tuple[int, int]) -> None:
    _check(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8), Scratch())


@pytest.mark.parametrize("kind", ["ramp", "steep ramp", "checks", "cells", "shapes", "poster"])
def test_equals_opencvs_graph_segmentation_where_weights_are_equal(kind: str) -> None:
    """Regions below the minimum size join their neighbors in the order in which std::sort leaves equal weights."""
    for conversion in (cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2LAB):
        _check(cv2.cvtColor(draw_flat(kind), conversion), Scratch())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5000), st.sampled_from([1e-6, 0.01, 1.0, 400.0]), st.integers(1, 1000), st.integers(0, 2**32 - 1))
def test_sorts_edges_like_numpy(count: int, scale: float, num_distinct: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.random(num_distinct) * scale).astype(np.float32)[rng.integers(0, num_distinct, count)]
    edges = (weights.view(np.uint32).astype(np.uint64) << np.uint64(32)) | rng.permutation(count).astype(np.uint64)
    ordered = np.empty_like(edges)
    expected = edges[np.argsort(weights, kind="stable")]
    _sort_edges(edges.copy(), ordered)
    np.testing.assert_array_equal(ordered, expected)


@pytest.mark.parametrize("shape", [(90, 120), (121, 64), (40, 133), (133, 40)])
def test_derivatives_equal_opencvs(shape: tuple[int, int]) -> None:
    """The rotated planes as cv2.warpAffine gives them, over the whole bounding box and cropped."""
    height, width = shape
    image = cv2.GaussianBlur(np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8), (0, 0), 2)
    planes = derivatives(image, Scratch())
    center = (width / 2, height / 2)
    box_width, box_height = cv2.RotatedRect(center, (width, height), 45.0).boundingRect()[2:]
    rotation = cv2.getRotationMatrix2D(center, 45.0, 1.0)
    rotation[:, 2] += (box_width / 2 - center[0], box_height / 2 - center[1])
    rotated = cv2.warpAffine(image, rotation, (box_width, box_height))
    back = cv2.getRotationMatrix2D((box_width // 2, box_height // 2), -45.0, 1.0)
    left, top = max(0, box_width - width) // 2, max(0, box_height - height) // 2
    for axis in (0, 1):
        np.testing.assert_array_equal(planes[axis].reshape(*shape, 3), cv2.Scharr(image, cv2.CV_32F, 1 - axis, axis))
        whole = cv2.warpAffine(cv2.Scharr(rotated, cv2.CV_32F, 1 - axis, axis), back, (2 * box_width, 2 * box_height))
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(planes[2 + axis].reshape(*shape, 3), expected)
