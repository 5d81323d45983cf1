"""The one reader of COCO-style annotation files: an odd entry is skipped, counted and named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from orl_fast import coco
from orl_fast.coco import read_annotations, read_image_ids, rotate_boxes
from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.shards.sources import find_sources, list_images

BOX = [4, 6, 20, 10]


def image(number: Any, **values: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48, **values}


def thing(image_id: Any, bbox: Any = BOX, **values: Any) -> dict[str, Any]:
    return {"image_id": image_id, "bbox": bbox, "category_id": 1, **values}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(images: list[Any], objects: list[Any], categories: Any = ({"id": 1, "name": "dog"},)) -> Path:
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps({"info": {}, "annotations": objects, "images": images, "categories": categories}))
        return file

    return _write


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    return caplog


def test_images_by_id_objects_by_image_and_no_crowds(write: Any) -> None:
    objects = [thing(9, [1, 2, 3, 4]), thing(7), thing(9, [0.5, 0, 9, 9]), thing(7, iscrowd=1)]
    found = read_annotations(write([image(9), image(7), image(8)], objects))
    assert found.file_names == ("7.jpg", "8.jpg", "9.jpg")
    assert found.images.tolist() == [0, 2, 2]
    assert [found.boxes_of(i).tolist() for i in range(3)] == [[[4, 6, 24, 16]], [], [[1, 2, 4, 6], [0.5, 0, 9.5, 9]]]
    assert (found.labels.tolist(), found.categories, found.num_skipped) == ([0, 0, 0], ("dog",), 0)
    assert found.sizes_px.tolist() == [[64, 48]] * 3


def test_a_complete_reading_has_crowds_and_the_entries_themselves(write: Any) -> None:
    objects = [thing(9, iscrowd=1, area=5), thing(7, segmentation=[[1, 2, 3, 4, 5, 6]]), thing("x"), thing(7, [], iscrowd=1)]
    file = write([image(9), image(7), image(7, id=3)], objects)
    found = read_annotations(file, complete=True)
    assert found.images.tolist() == [0, 1]
    assert [entry.get("iscrowd", 0) for entry in found.entries] == [0, 1]
    assert found.entries[0]["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    assert (found.file_names, found.image_ids, found.category_ids, found.num_skipped) == (("7.jpg", "9.jpg"), (3, 9), (1,), 2)
    assert read_annotations(file).entries == ()


@pytest.mark.parametrize(("value", "crowd"), [(1, True), ("1", True), (1.0, True), (True, True), (0, False), ("0", False), (None, False)])
def test_crowds_are_marked_by_numbers_or_text(value: Any, crowd: bool, write: Any) -> None:
    assert len(read_annotations(write([image(1)], [thing(1), thing(1, iscrowd=value)])).images) == 2 - crowd


@pytest.mark.parametrize(("listed", "referred"), [(1, "1"), ("1", 1), (1.0, 1), ("a", "a"), ("000001", 1), ("2007_000032", "2007_000032")])
def test_ids_are_joined_however_they_are_written(listed: Any, referred: Any, write: Any) -> None:
    found = read_annotations(write([image(2), image(listed)], [thing(referred, category_id="1")]))
    assert found.file_names[found.images[0]] == f"{listed}.jpg"
    assert found.labels.tolist() == [0]


ODD = [
    (thing(1, []), "without a box"),
    (thing(1, [1, 2, 3]), "without a box"),
    (thing(1, [1, 2, 0, 5]), "without a box"),
    (thing(1, [1, 2, float("nan"), 5]), "without a box"),
    (thing(1, [1, 2, None, 5]), "without a box"),
    ({"image_id": 1, "category_id": 1, "segmentation": []}, "without a box"),
    (thing(99), "of an image that is not listed"),
    ({"bbox": BOX}, "of an image that is not listed"),
    (None, "of an image that is not listed"),
    (thing(2), "shares its id with another"),
    (thing(1, [0.1, 0.2, 0.5, 0.9]), "within 0 … 1"),
]


@pytest.mark.parametrize(("entry", "reason"), ODD)
def test_an_odd_object_is_skipped_counted_and_named(entry: Any, reason: str, write: Any, warnings: pytest.LogCaptureFixture) -> None:
    images = [image(1), image(2), image(2, file_name="other.jpg")]
    good = thing(1)
    named = entry | {"id": 77} if entry else entry
    found = read_annotations(write(images, [good, named, good]))
    assert found.boxes.tolist() == [[4, 6, 24, 16]] * 2
    assert found.num_skipped == 1
    (record,) = warnings.records
    assert reason in record.getMessage()
    assert ": 1 objects " in record.getMessage() or ": 1 boxes " in record.getMessage()
    assert record.getMessage().endswith("id 77" if entry else "number 1")


def test_many_odd_objects_are_counted_and_a_few_named(write: Any, warnings: pytest.LogCaptureFixture) -> None:
    found = read_annotations(write([image(1)], [thing(1), *(thing(99, id=i) for i in range(5))]))
    assert found.num_skipped == 5
    assert "5 objects of an image" in warnings.text
    assert "id 0, id 1, id 2, …" in warnings.text


@pytest.mark.parametrize("missing", ["width", "height"])
def test_an_image_without_a_size_keeps_its_objects(missing: str, write: Any) -> None:
    entry = image(1)
    del entry[missing]
    found = read_annotations(write([entry], [thing(1)]))
    assert (found.sizes_px.tolist(), len(found.boxes)) == ([[0, 0]], 1)


def test_an_unknown_category_costs_the_label_not_the_box(write: Any) -> None:
    found = read_annotations(write([image(1)], [thing(1), thing(1, category_id=5), {"image_id": 1, "bbox": BOX}]))
    assert found.labels.tolist() == [0, -1, -1]
    assert read_annotations(write([image(1)], [thing(1)], categories=None)).labels.tolist() == [-1]


def test_categories_of_one_name_are_one_and_of_one_id_are_none(write: Any, warnings: pytest.LogCaptureFixture) -> None:
    names = {1: "dog", 2: "cat", 3: "dog", 4: "cow"}
    categories = [*({"id": key, "name": name} for key, name in names.items()), {"id": 4, "name": "horse"}, {"id": 5}, "x"]
    found = read_annotations(write([image(1)], [thing(1, category_id=key) for key in names], categories))
    assert [found.categories[label] if label >= 0 else None for label in found.labels] == ["dog", "cat", "dog", None]
    assert "1 categories listed again by the same name, merged: dog" in warnings.text
    assert "2 categories without a name or an id: id 5, number 6" in warnings.text


def test_one_file_name_under_two_ids_is_merged(write: Any, warnings: pytest.LogCaptureFixture) -> None:
    file = write([image(1, file_name="a.jpg"), image(2), image(3, file_name="a.jpg")], [thing(1, [1, 1, 9, 9]), thing(2), thing(3)])
    found = read_annotations(file)
    assert found.file_names == ("a.jpg", "2.jpg")
    assert found.boxes_of(0).tolist() == [[1, 1, 10, 10], [4, 6, 24, 16]]
    assert "1 images listed again by the same name, merged: a.jpg" in warnings.text
    warnings.clear()
    assert read_image_ids(file) == {"a.jpg": 1, "2.jpg": 2}
    assert "1 images listed again by the same name, merged: a.jpg" in warnings.text


def test_boxes_that_are_shares_are_refused_with_the_remedy(write: Any) -> None:
    with pytest.raises(DataError, match=r"2 boxes within 0 … 1, which look like shares.*multiply x and width by the image's width"):
        read_annotations(write([image(1)], [thing(1, [0, 0, 1, 1]), thing(1, [0.25, 0.5, 0.1, 0.2]), thing(1, iscrowd=1)]))


def test_a_file_of_which_no_object_can_be_used_is_refused(write: Any) -> None:
    with pytest.raises(DataError, match=r"none of its 2 objects can be used \(1 objects of an image.*; 1 objects without a box"):
        read_annotations(write([image(1)], [thing(9), thing(1, []), thing(1, iscrowd=1)]))
    assert len(read_annotations(write([image(1)], [thing(1, iscrowd=1)])).boxes) == 0
    assert len(read_annotations(write([image(1)], [])).boxes) == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"images": 3}', '{"images": [{"id": 1}]}', '{"images": [[]], "annotations": []}']
)
def test_what_is_no_annotation_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    for read in (read_image_ids, read_annotations):
        with pytest.raises(DataError, match=r"x\.json: (not a COCO-style annotation file|cannot be read as JSON)"):
            read(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(tmp_path)


def test_images_are_read_without_the_rest_of_the_file(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write([image(30), image(9)], [thing(9)])
    expected = {"30.jpg": 30, "9.jpg": 9}
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(coco, "read_json", lambda _: pytest.fail("the whole file was parsed"))
        assert read_image_ids(file) == expected
        file.write_text(
            file.read_text("utf-8-sig").replace('"file_name"', '"license": 1, "coco_url"').replace("30.jpg", "http://x/y/30.jpg")
        )
        assert read_image_ids(file) == expected
    # Where another list of that name comes first, and where entries are odd, all of it is.
    file.write_text('{"info": {"images": [{"id": 1}]}, ' + file.read_text()[1:])
    assert read_image_ids(file) == expected
    assert read_image_ids(write([image(30), None, {"id": 3}, {"file_name": "a"}, image(9)], [])) == expected


def test_ids_that_are_no_numbers_become_positions(write: Any, warnings: pytest.LogCaptureFixture) -> None:
    ids = ["2008_000002", "2007_000033", "2007_000032"]
    assert read_image_ids(write([image(key) for key in ids], [])) == {f"{key}.jpg": position for position, key in enumerate(ids)}
    assert "numbered by their position" in warnings.text
    assert read_image_ids(write([image("7"), image(3.0)], [])) == {"7.jpg": 7, "3.0.jpg": 3}


def test_shard_reads_odd_annotation_files(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    for name in "abc":
        (tmp_path / "train2017" / f"{name}.jpg").write_bytes(b"x")
    entries = [{"id": "2007_2", "file_name": "c.jpg"}, {"id": "2007_1", "file_name": "a.jpg"}, {"id": 5}, {"id": "x", "file_name": "c.jpg"}]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps({"images": entries}))
    listing = list_images(find_sources([tmp_path]))
    assert [(entry.file_name, entry.image_id) for entry in listing.images] == [("c.jpg", 0), ("a.jpg", 1), ("b.jpg", 2)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_rotate_with_the_picture(orientation: int) -> None:
    stored = Image.new("RGB", (40, 30))
    boxes = np.array([[3, 5, 17, 9], [20, 1, 39, 30]], np.float64)
    for number, box in enumerate(boxes):
        pen = ImageDraw.Draw(stored)
        pen.rectangle([*box[:2].tolist(), *(box[2:] - 1).tolist()], fill=(0, 0, 100 + number))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.getexif().update(exif)
    upright = np.array(ImageOps.exif_transpose(stored))[..., 2]
    rotated = rotate_boxes(boxes, orientation=orientation, size_px=stored.size)
    for number, box in enumerate(rotated):
        rows, columns = np.nonzero(upright == 100 + number)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert rotate_boxes(boxes[:0], orientation=orientation, size_px=stored.size).shape == (0, 4)
