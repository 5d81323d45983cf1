"""The proposals of a folder as one file, against selective search called directly."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orl_fast.boxes import filter_proposals
from orl_fast.errors import DataError
from orl_fast.mining.propose import image_seed, write_proposals
from orl_fast.selective_search import selective_search


def _scene(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(coarse.repeat(10, 0).repeat(10, 1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, nested, one of them rotated by its EXIF data, and one that is broken."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    for i in range(6):
        _scene(i).save(folder / f"{i}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    _scene(6).save(folder / "deep" / "rotated.jpg", exif=exif)
    _scene(7).convert("RGBA").save(folder / "deep" / "plain.png")
    (folder / "2b.jpg").write_bytes((folder / "2.jpg").read_bytes()[:-300])
    return folder


def _written(photos: Path, **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    write_proposals(photos, file, **options)
    values: dict[str, Any] = json.loads(file.getvalue())
    return values


def _boxes(values: dict[str, Any], file_name: str) -> np.ndarray:
    """[P, 4] xyxy of one image, in the file's order."""
    image_id = next(image["id"] for image in values["images"] if image["file_name"] == file_name)
    boxes = np.array([entry["bbox"] for entry in values["annotations"] if entry["image_id"] == image_id])
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def test_file_holds_what_selective_search_finds(photos: Path) -> None:
    values = _written(photos, seed=3)
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "deep/plain.png", "deep/rotated.jpg"]
    assert [image["file_name"] for image in values["images"]] == names
    assert [entry["id"] for entry in values["annotations"]] == list(range(1, 1 + len(values["annotations"])))
    assert all(entry["area"] == entry["bbox"][2] * entry["bbox"][3] for entry in values["annotations"])
    assert {entry["category_id"] for entry in values["annotations"]} == {values["categories"][0]["id"]}
    assert values["info"]["seed"] == 3
    assert list(values["skipped"]) == ["2b.jpg"]
    for name in names[:6]:
        with Image.open(photos / name) as image:
            expected = selective_search(np.asarray(image), seed=image_seed(name, 3))
        np.testing.assert_array_equal(_boxes(values, name), expected)


def test_boxes_are_in_the_upright_frame(photos: Path) -> None:
    values = _written(photos)
    rotated = values["images"][-1]
    assert (rotated["width"], rotated["height"]) == (70, 90)
    for image in values["images"]:
        low, high = _boxes(values, image["file_name"]).min(axis=0), _boxes(values, image["file_name"]).max(axis=0)
        assert [*low[:2], *high[2:]] == [0, 0, image["width"], image["height"]]


def test_an_image_has_the_same_boxes_alone_in_a_folder_and_by_any_worker(photos: Path) -> None:
    file = io.BytesIO()
    write_proposals(photos, file, num_workers=1)
    again = io.BytesIO()
    write_proposals(photos, again, num_workers=3)
    assert again.getvalue() == file.getvalue()
    alone = _written(photos / "4.jpg")
    np.testing.assert_array_equal(_boxes(alone, "4.jpg"), _boxes(json.loads(file.getvalue()), "4.jpg"))
    other = _written(photos / "4.jpg", seed=1)
    assert sorted(_boxes(other, "4.jpg").tolist()) == sorted(_boxes(alone, "4.jpg").tolist())
    assert _boxes(other, "4.jpg").tolist() != _boxes(alone, "4.jpg").tolist()


LIMITS: list[dict[str, Any]] = [
    {"min_side_px": 25},
    {"max_aspect": 1.5},
    {"max_iou": 0.3},
    {"max_rois": 4},
    {"min_side_px": 15, "max_iou": 0.5, "max_rois": 3},
]


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_are_those_of_the_filter(photos: Path, limits: dict[str, Any]) -> None:
    off = {"min_side_px": 0, "max_aspect": 1e9, "max_iou": 1.0, "max_rois": 10**9}
    values, unlimited = _written(photos, limits=limits), _written(photos)
    assert values["info"]["filter"] == limits
    for image in values["images"]:
        boxes = _boxes(unlimited, image["file_name"])
        np.testing.assert_array_equal(_boxes(values, image["file_name"]), boxes[filter_proposals(boxes, **{**off, **limits})])


def test_nothing_decodable_writes_nothing(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image can be decoded, the first is '2b.jpg'"):
        write_proposals(photos / "2b.jpg", tmp_path / "boxes.json")
    assert list(tmp_path.iterdir()) == []
