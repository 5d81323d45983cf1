"""Selective search against OpenCV's, on photographs and on images that break naive implementations."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_photos import draw_flat, draw_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from orl_fast.errors import DataError
from orl_fast.selective_search import Backend, one_opencv_thread, selective_search
from orl_fast.selective_search.descriptors import describe_atoms
from orl_fast.selective_search.grouping import _group, _group_as_listed, _sum_atoms
from orl_fast.selective_search.scratch import Scratch
from orl_fast.selective_search.search import all_regions
from orl_fast.selective_search.segmentation import segment


def _set(boxes: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(box) for box in boxes.tolist()}


def _check(boxes: np.ndarray, height: int, width: int) -> None:
    assert boxes.dtype == np.int16
    assert len(boxes) >= 1
    assert len(_set(boxes)) == len(boxes)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()


def test_finds_opencvs_boxes_on_photographs() -> None:
    for seed in range(5):
        photo = draw_photo(seed)
        assert _set(selective_search(photo, seed=1)) == _set(selective_search(photo, seed=1, backend="opencv")), seed


def test_finds_opencvs_boxes_on_a_panorama() -> None:
    """Narrower than its rotated bounding box, in either direction."""
    photo = draw_photo(5, width=440, height=300)[100:190]
    for image in (photo, np.ascontiguousarray(photo.transpose(1, 0, 2))):
        assert _set(selective_search(image, seed=1)) == _set(selective_search(image, seed=1, backend="opencv"))


@pytest.mark.parametrize("kind", ["ramp", "steep ramp", "checks", "cells", "shapes", "poster"])
def test_finds_opencvs_boxes_where_edges_and_regions_are_alike(kind: str) -> None:
    """Of equal edges and of equally similar regions, std::sort decides which come first."""
    image = draw_flat(kind)
    assert _set(selective_search(image, seed=1)) == _set(selective_search(image, seed=1, backend="opencv"))


@pytest.mark.parametrize("kind", ["photo", "shapes", "poster", "ramp"])
def test_groups_as_opencvs_list_does(kind: str) -> None:
    """The fast grouping makes the merges of a list that std::sort orders before each, or none where equal similarities decide."""
    image, scratch = draw_photo(6, width=200, height=150) if kind == "photo" else draw_flat(kind), Scratch()
    atom_of_pixel, regions = segment(image, scratch)
    atoms = describe_atoms(image, atom_of_pixel, regions.shape[1], scratch)
    for region_of_atom in regions:
        described = _sum_atoms(atoms, region_of_atom, int(region_of_atom.max()) + 1)
        for with_color in (True, False):
            fast, listed = (np.column_stack(group(*described, image.size // 3, with_color)) for group in (_group, _group_as_listed))
            assert len(fast) or kind != "photo"
            if len(fast):
                np.testing.assert_array_equal(fast[np.lexsort(fast.T)], listed[np.lexsort(listed.T)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 2), (2, 90), (16, 16), (16, 400), (120, 90)])
def test_small_and_noise_images(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    gray = np.ascontiguousarray(np.broadcast_to(noise[..., :1], noise.shape))
    for image in (noise, gray, np.full_like(noise, 77), np.zeros_like(noise)):
        boxes = selective_search(image, seed=0)
        _check(boxes, *shape)
        if image.min() == image.max():
            assert boxes.tolist() == [[0, 0, shape[1], shape[0]]]


def test_gray_photograph_as_opencv() -> None:
    """Two channels have no gradient at all, where OpenCV divides by zero."""
    gray = np.repeat(draw_photo(2)[..., 1:2], 3, axis=2)
    assert _set(selective_search(gray, seed=1)) == _set(selective_search(gray, seed=1, backend="opencv"))


@pytest.mark.parametrize("backend", ["fast", "opencv"])
def test_takes_any_memory_layout(backend: Backend) -> None:
    photo = draw_photo(3, width=120, height=90)
    read_only = photo.copy()
    read_only.flags.writeable = False
    planes = np.ascontiguousarray(photo.transpose(2, 0, 1))
    every_other = np.zeros((180, 240, 4), np.uint8)[::2, ::2, :3]
    every_other[:] = photo
    mirrored = np.ascontiguousarray(photo[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    expected = selective_search(photo, seed=4, backend=backend)
    for layout in (read_only, np.asfortranarray(photo), planes.transpose(1, 2, 0), every_other, mirrored):
        kept = layout.copy()
        np.testing.assert_array_equal(selective_search(layout, seed=4, backend=backend), expected)
        np.testing.assert_array_equal(layout, kept)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_boxes_are_inside_and_unique(height: int, width: int, cell: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
    image = np.ascontiguousarray(coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width])
    _check(selective_search(image, seed=seed), height, width)


def test_order_is_random_times_level() -> None:
    photo = draw_photo(1)
    boxes, levels = all_regions(photo)
    first = selective_search(photo, seed=5)
    with ThreadPoolExecutor(3) as pool:
        for again in pool.map(lambda _: selective_search(photo, seed=5), range(3)):
            np.testing.assert_array_equal(again, first)
    assert _set(first) == _set(boxes)
    assert not np.array_equal(selective_search(photo, seed=6), first)
    # P(a low region comes before a high one) for rank = u * level: among the leading fifth, low levels are over-represented as drawn
    rng = np.random.default_rng(0)
    lowest: dict[tuple[int, ...], list[int]] = {}
    for box, level in zip(boxes.tolist(), levels.tolist(), strict=True):
        lowest.setdefault(tuple(box), []).append(level)
    own = [np.mean(lowest[tuple(box)]) for box in first.tolist()]
    head = len(own) // 5
    expected = []
    for _ in range(200):
        rank = rng.random(len(boxes)) * levels
        order = list(dict.fromkeys(tuple(box) for box in boxes[np.argsort(rank)].tolist()))
        expected.append(np.mean([np.mean(lowest[box]) for box in order[:head]]))
    assert abs(np.mean(own[:head]) - np.mean(expected)) < 5 * np.std(expected)


def test_opencv_backend_repeats_its_order() -> None:
    photo = draw_photo(1, width=240, height=180)
    first = selective_search(photo, seed=5, backend="opencv")
    np.testing.assert_array_equal(selective_search(photo, seed=5, backend="opencv"), first)
    assert not np.array_equal(selective_search(photo, seed=6, backend="opencv"), first)


def test_refuses_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="uint8"):
        selective_search(np.zeros((4, 4), np.uint8), seed=0)
    with pytest.raises(DataError, match="40000 × 1"):
        selective_search(np.zeros((1, 40000, 3), np.uint8), seed=0)
    with pytest.raises(ValueError, match="backend"):
        selective_search(np.zeros((4, 4, 3), np.uint8), seed=0, backend="slow")  # type: ignore[arg-type]


def test_one_opencv_thread_is_given_back() -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        with pytest.raises(KeyError), one_opencv_thread():
            assert cv2.getNumThreads() == 1
            raise KeyError
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "proposals.md").read_text()
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_photo(1)).save("photo.jpg", quality=95)
    exec(text.split("```python\n")[1].split("```")[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.fullmatch(r"\d+ × \d+ px at \(\d+, \d+\)", line) for line in lines)
