"""Which class files have, and what is refused: names alone, no images."""

import json
from pathlib import Path
from typing import Any

import pytest

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.evals.layouts import folder_classes, in_system_folder, numbered_as, read_labels


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(log, "warning", lambda message, *values: messages.append(message % values))
    return messages


def _list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def _inat(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"train_val2018/Aves/{i % 2}/{i}.jpg", "width": 8, "height": 8} for i in (3, 1, 2)],
        "annotations": [{"id": 10 + i, "image_id": i, "category_id": 7 - i % 2} for i in (1, 2, 3)],
        "categories": [{"id": 7, "name": "owl", "supercategory": "Aves"}, {"id": 6, "name": "gull", "supercategory": "Aves"}],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_the_first_folder_is_the_class_outside_of_system_folders(warnings: list[str]) -> None:
    names = [
        "b/1.jpg",
        "a/deep/2.jpg",
        "a/@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg",
        ".thumbnails/3.jpg",
        "__MACOSX/a/4.jpg",
        "loose.jpg",
        "#recycle/a/5.jpg",
    ]
    assert folder_classes(names, root=Path("data")) == ["b", "a", None, None, None, None, None]
    assert warnings == ["data: 4 images in hidden or system folders: skipped", "data: 1 images in no class folder: skipped"]
    assert not in_system_folder("n01440764/a.b/c.jpg")


@pytest.mark.parametrize(
    "names", [["a/abbey/1.jpg", "a/airport/2.jpg", "b/bar/3.jpg"], ["Aves/12/1.jpg", "Plantae/7/2.jpg", "Plantae/8/3.jpg"]]
)
def test_folders_of_class_folders_are_refused(names: list[str]) -> None:
    with pytest.raises(DataError, match="which of them are classes is not known"):
        folder_classes(names, root=Path("data"))


def test_one_folder_within_each_class_is_not_a_class() -> None:  # Tiny ImageNet: train/n01443537/images/n01443537_0.JPEG
    assert folder_classes(["n1/images/1.jpg", "n2/images/2.jpg"], root=Path("data")) == ["n1", "n2"]


@pytest.mark.parametrize("pair", [("train2017", "val2017"), ("Training", "Validation"), ("train", "test"), ("train_2018", "test-2018")])
def test_parts_of_a_data_set_are_not_classes(pair: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="named like parts of a data set"):
        folder_classes([f"{name}/1.jpg" for name in pair], root=Path("data"))
    assert folder_classes(["train/1.jpg", "bus/2.jpg", "tram/3.jpg"], root=Path("data")) == ["train", "bus", "tram"]


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_lines_of_path_and_label(tmp_path: Path, separator: str, warnings: list[str]) -> None:
    pairs = [("/a/abbey/x.jpg", "0"), ("b/my photo, big.jpg", "10"), ("./c/y.jpg", "2"), ("a/abbey/x.jpg", "0"), ('"d/z.jpg"', "02")]
    found = read_labels(_list(tmp_path / "list.csv", f"path{separator}label", *(separator.join(pair) for pair in pairs), ""))
    assert found.labels == {"a/abbey/x.jpg": "0", "b/my photo, big.jpg": "10", "c/y.jpg": "2", "d/z.jpg": "2"}
    assert found.classes == ("0", "2", "10")  # numbers by value
    assert found.num_skipped == 1  # the header
    assert len(warnings) == 1


def test_a_file_with_several_labels_is_skipped(tmp_path: Path, warnings: list[str]) -> None:
    found = read_labels(_list(tmp_path / "list.txt", "a.jpg cat", "b.jpg dog", "a.jpg dog", "a.jpg cat"))
    assert found.labels == {"b.jpg": "dog"}
    assert "files with several labels: skipped (a.jpg" in warnings[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("a.jpg", "b.jpg", "c.jpg"), "3 of 3 lines are no path and label"),
        (("490", "361", "171"), "lines must read"),  # ILSVRC2012_validation_ground_truth.txt
        (("a.jpg 0", "b.jpg -1"), r"line 2: label -1 is out of range"),
        ((), "0 of 0 lines"),
    ],
)
def test_lists_of_something_else_are_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(_list(tmp_path / "list.txt", *lines))
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "missing.txt")


def test_numbers_are_positions_of_named_classes(tmp_path: Path) -> None:
    found = read_labels(_list(tmp_path / "val.txt", "x.jpg 1", "y.jpg 0"))
    assert numbered_as(found, ["cat", "dog"]).labels == {"x.jpg": "dog", "y.jpg": "cat"}
    assert numbered_as(found, ["0", "1"]) is found
    with pytest.raises(DataError, match="label 2 is out of range: there are 2 classes"):
        numbered_as(read_labels(_list(tmp_path / "from1.txt", "x.jpg 1", "y.jpg 2")), ["cat", "dog"])


def test_inaturalist_labels_images_without_boxes(tmp_path: Path) -> None:
    found = read_labels(_inat(tmp_path / "train2018.json"))
    assert found.classes == ("gull", "owl")  # by id
    assert [(Path(name).name, label) for name, label in found.labels.items()] == [("1.jpg", "gull"), ("2.jpg", "owl"), ("3.jpg", "gull")]


def test_odd_entries_of_inaturalist_are_skipped_and_counted(tmp_path: Path, warnings: list[str]) -> None:
    annotations = [
        {"id": 1, "image_id": "1", "category_id": 6.0},  # as text, as a float: the same ids
        {"id": 2, "image_id": 2, "category_id": 99},
        {"id": 3, "image_id": 404, "category_id": 6},
        {"id": 4, "image_id": 3, "category_id": 6},
        {"id": 5, "image_id": 3, "category_id": 7},
        {"id": 6, "image_id": 1},
        None,
    ]
    found = read_labels(_inat(tmp_path / "odd.json", annotations=annotations))
    assert [(Path(name).name, label) for name, label in found.labels.items()] == [("1.jpg", "gull")]
    assert found.num_skipped == 5
    assert any("1 images of several categories" in message for message in warnings)


def test_categories_with_one_name_are_told_apart_or_refused(tmp_path: Path) -> None:
    same = [
        {"id": 6, "name": "Ficus variegata", "supercategory": "Plantae"},
        {"id": 7, "name": "Ficus variegata", "supercategory": "Mollusca"},
    ]
    assert read_labels(_inat(tmp_path / "a.json", categories=same)).classes == ("Plantae/Ficus variegata", "Mollusca/Ficus variegata")
    for odd in ([entry | {"supercategory": "Plantae"} for entry in same], [{"id": 6, "name": "x"}, {"id": 7, "name": "x"}]):
        with pytest.raises(DataError, match=r"several categories are named .* \(ids 6, 7\); rename them"):
            read_labels(_inat(tmp_path / "b.json", categories=odd))
    unnamed = read_labels(_inat(tmp_path / "c.json", categories=[{"id": 6}, {"id": 7}]))
    assert unnamed.classes == ("6", "7")


def test_a_file_that_labels_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels none of its 3 images"):
        read_labels(_inat(tmp_path / "test2018.json", annotations=[]))
    with pytest.raises(DataError, match="not a COCO-style annotation file"):
        read_labels(_inat(tmp_path / "empty.json", images=None))
    boxes = [{"id": 1, "image_id": 1, "category_id": 6, "bbox": [0, 0, 4, 4]}]
    with pytest.raises(DataError, match="annotates boxes, not whole images"):
        read_labels(_inat(tmp_path / "instances_train.json", annotations=boxes))
