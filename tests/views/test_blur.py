"""The blur kernel against PIL's GaussianBlur: equal to the last bit, for every sigma."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from orl_fast.views.blur import blur_columns


def blurred(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Along rows, then along columns, as PIL does; rows and columns are padded as planes of views are."""
    side = -(-max(image.shape) // 32) * 32
    sums, out = np.empty(side, np.uint32), np.empty((side, side), np.uint8)
    for _ in range(2):
        plane = np.zeros((side, side), np.uint8)
        plane[: image.shape[1], : image.shape[0]] = image.T
        blur_columns(plane, image.shape[1], np.float32(sigma), sums, out)
        image = out[: image.shape[1], : image.shape[0]].copy()
    return image


def expected(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(np.float32(sigma)))))


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.3, 0.45, 1.0, 1.41, 1.42, 2.0, 2.45, 3.0, 8.0, 40.0])
def test_noise_and_edges(sigma: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96)).astype(np.uint8)
    edge = np.where(np.arange(224) < 100, 0, 255).astype(np.uint8)[None].repeat(224, axis=0)
    for image in (noise, edge, edge.T.copy()):
        assert np.array_equal(blurred(image, sigma), expected(image, sigma))


@settings(max_examples=60, deadline=None)
@given(sigma=st.floats(0.0625, 12, width=32), height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_size_and_sigma(sigma: float, height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    assert np.array_equal(blurred(image, sigma), expected(image, sigma))


def test_an_edge_as_the_reference_has_it() -> None:
    image = np.repeat(np.array([[0, 255]], np.uint8), 16, axis=1).repeat(32, axis=0)
    assert blurred(image, 0.3)[8, 14:18].tolist() == [0, 11, 244, 255]
    assert blurred(image, 0.2)[8, 14:18].tolist() == [0, 6, 249, 255]
