import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.labels import LabelledOptions, Objects, labelled_data, open_labelled, split_by_image, with_test
from tests.evals.drawn_classes import draw_image


def _write(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)


def _coco(root: Path, num_images: int = 3) -> Path:
    annotations = []
    for i in range(num_images):
        _write(root / "val" / f"{i}.jpg")
        annotations += [
            {"id": 3 * i, "image_id": 10 + i, "category_id": 7, "bbox": [1, 2, 10, 12], "iscrowd": 0},
            {"id": 3 * i + 1, "image_id": 10 + i, "category_id": 3, "bbox": [5, 6, 20, 9.5]},
            {"id": 3 * i + 2, "image_id": 10 + i, "category_id": 3, "bbox": [0, 0, 30, 30], "iscrowd": 1},
        ]
    annotations.append({"id": 99, "image_id": 10, "category_id": 7, "bbox": [0, 0, 3, 30], "iscrowd": 0})  # too narrow to use
    images = [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(num_images)] + [{"id": 50, "file_name": "absent.jpg"}]
    annotations.append({"id": 100, "image_id": 50, "category_id": 7, "bbox": [0, 0, 30, 30], "iscrowd": 0})
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 5, "name": "unseen"}]
    file = root / "annotations" / "instances_val.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "b/deep/2.PNG", "a/3.jpeg", ".hidden/4.jpg"):
        _write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    objects = open_labelled(tmp_path)
    assert objects.classes == ("a", "b")
    assert [path.name for path in objects.paths] == ["3.jpeg", "1.jpg", "2.PNG"]
    assert objects.labels.tolist() == [0, 1, 1]
    assert objects.boxes is None


@pytest.mark.parametrize("how", ["file", "root", "split"])
def test_coco_boxes_without_crowds_slivers_and_absent_images(tmp_path: Path, how: str) -> None:
    file = _coco(tmp_path)
    objects = open_labelled({"file": file, "root": tmp_path, "split": tmp_path / "val"}[how])
    assert objects.classes == ("cat", "dog")
    assert len(objects) == 6
    assert objects.boxes is not None
    assert objects.boxes[:2].tolist() == [[1, 2, 11, 14], [5, 6, 25, 15.5]]
    assert [objects.classes[label] for label in objects.labels[:2]] == ["dog", "cat"]
    assert [objects.paths[i].name for i in objects.images] == ["0.jpg", "0.jpg", "1.jpg", "1.jpg", "2.jpg", "2.jpg"]


def test_what_is_no_labelled_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_labelled(tmp_path / "missing")
    with pytest.raises(DataError, match="0 subfolders hold images"):
        open_labelled(tmp_path)
    damaged = tmp_path / "damaged.json"
    for text in ("{", "[]", '{"images": [], "annotations": [], "categories": [{"id": 1}]}'):
        damaged.write_text(text)
        with pytest.raises(
            DataError, match=r"damaged\.json: (not a COCO-style annotation file|cannot be read as JSON|0 classes have boxes)"
        ):
            open_labelled(damaged)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(DataError, match="with --images"):
        open_labelled(_coco(tmp_path / "coco"), images=elsewhere)


def test_split_shares_no_image_and_tests_every_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(0, 40, 200))
    objects = Objects(
        paths=tuple(Path(f"{i}.jpg") for i in range(40)),
        images=images,
        labels=rng.integers(0, 4, 200),
        classes=("a", "b", "c", "d"),
        boxes=np.stack([images, images, images + 9, images + 9], axis=1).astype(np.float32),
    )
    train, test = split_by_image(objects, held_out=0.25, seed=1)
    assert not set(train.paths) & set(test.paths)
    assert len(train) + len(test) == 200
    assert 0.15 < len(test.paths) / 40 < 0.35
    for part in (train, test):  # every object still shows its own image
        assert part.boxes is not None
        assert [path.name for path in np.array(part.paths)[part.images]] == [f"{int(box[0])}.jpg" for box in part.boxes]
    again, other = (split_by_image(objects, held_out=0.25, seed=seed)[1] for seed in (1, 2))
    assert again.paths == test.paths != other.paths


def test_one_image_per_class_cannot_be_split(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg"):
        _write(tmp_path / name)
    with pytest.raises(DataError, match="too few to hold some out"):
        split_by_image(open_labelled(tmp_path), held_out=0.3, seed=0)


def test_test_data_are_matched_by_class_name(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "test/b/4.jpg", "test/c/5.jpg", "other/b/6.jpg", "other/z/7.jpg"):
        _write(tmp_path / name)
    train = open_labelled(tmp_path / "train")
    _, test = with_test(train, open_labelled(tmp_path / "test"))
    assert test.classes == ("a", "b", "c")
    assert test.labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="training data lack: z"):
        with_test(train, open_labelled(tmp_path / "other"))
    with pytest.raises(DataError, match="is in the training data and in the test data"):
        with_test(train, train)


def test_a_root_with_splits_is_used_as_such(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg"):
        _write(tmp_path / name)
    train, test = labelled_data(tmp_path, LabelledOptions(), Context(device=torch.device("cpu")))
    assert train.classes == ("a", "b")
    assert [path.name for part in (train, test) for path in part.paths] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]


def test_system_folders_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("a/1.jpg", "a/@eaDir/1.jpg/thumb.jpg", "b/2.jpg", "@eaDir/x.jpg", "__MACOSX/a/1.jpg", ".thumbnails/y.jpg", "loose.jpg"):
        _write(tmp_path / name)
    objects = open_labelled(tmp_path)
    assert objects.classes == ("a", "b")
    assert [path.name for path in objects.paths] == ["1.jpg", "2.jpg"]
    assert objects.num_skipped_images == 5  # with the dangling link; hidden folders are not listed at all


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train2017/1.jpg", "val2017/2.jpg"), "named like parts of a data set"),
        (("Training/a/1.jpg", "Validation/b/2.jpg", "x/3.jpg"), "named like parts of a data set"),
        (("a/abbey/1.jpg", "a/airport/2.jpg", "b/bar/3.jpg"), "which of them are classes is not known"),
        (("1.jpg", "2.jpg"), "0 subfolders hold images and 2 images lie in none; label these by a file"),
        (("a/1.jpg", "@eaDir/2.jpg"), "1 subfolders hold images"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        _write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_labelled(tmp_path)


def test_splits_are_found_in_any_case_and_a_flat_one_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("Train/a/1.png", "Train/b/2.png", "VAL/a/3.png", "VAL/b/4.png", "test/5.png")):
        draw_image(tmp_path / name, seed=seed)
    train, test = labelled_data(tmp_path, LabelledOptions(), Context(device=torch.device("cpu")))
    assert [path.name for part in (train, test) for path in part.paths] == ["1.png", "2.png", "3.png", "4.png"]
    shutil.rmtree(tmp_path / "VAL")
    with pytest.raises(DataError, match="test: 0 subfolders hold images and 1 images lie in none"):
        labelled_data(tmp_path, LabelledOptions(), Context(device=torch.device("cpu"), num_threads=2))
    (tmp_path / "list.txt").write_text("test/5.png 1\nVAL/9.png 0\n")
    with pytest.raises(DataError, match="1 of its 2 images are not in"):
        labelled_data(tmp_path, LabelledOptions(test=tmp_path / "list.txt"), Context(device=torch.device("cpu"), num_threads=3))
    draw_image(tmp_path / "VAL" / "9.png", seed=9)
    _, test = labelled_data(tmp_path, LabelledOptions(test=tmp_path / "list.txt"), Context(device=torch.device("cpu"), num_threads=4))
    assert {path.name: test.classes[label] for path, label in zip(test.paths, test.labels, strict=True)} == {"9.png": "a", "5.png": "b"}


def test_lists_and_image_labels_are_labelled_data(tmp_path: Path) -> None:
    for i in range(4):
        draw_image(tmp_path / "images256" / "a" / f"{i}.png", seed=i)
    (tmp_path / "train.csv").write_text("".join(f"a/{i}.png,{i % 2}\n" for i in range(4)))
    images = [{"id": i, "file_name": f"images256/a/{i}.png"} for i in range(4)]
    annotations = [{"id": i, "image_id": i, "category_id": i % 2} for i in range(4)]
    categories = [{"id": i, "name": str(i)} for i in range(2)]
    (tmp_path / "train2018.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    for name in ("train.csv", "train2018.json"):
        objects = open_labelled(tmp_path / name)
        assert objects.boxes is None
        assert objects.classes == ("0", "1")
        assert {path.name: label for path, label in zip(objects.paths, objects.labels.tolist(), strict=True)} == {
            f"{i}.png": i % 2 for i in range(4)
        }


def test_copies_of_test_images_are_not_learned_from(tmp_path: Path) -> None:
    for seed, name in enumerate(("train/a/1.png", "train/a/2.png", "train/b/3.png", "val/a/4.png", "val/b/5.png")):
        draw_image(tmp_path / name, seed=seed)
    shutil.copy(tmp_path / "val/a/4.png", tmp_path / "train/a/copy.png")
    train, test = labelled_data(tmp_path, LabelledOptions(), Context(device=torch.device("cpu")))
    assert [path.name for path in train.paths] == ["1.png", "2.png", "3.png"]
    assert (train.num_skipped_images, len(test)) == (1, 2)
    shutil.rmtree(tmp_path / "val")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    with pytest.raises(DataError, match="training images are test images too, byte for byte"):
        labelled_data(tmp_path, LabelledOptions(), Context(device=torch.device("cpu"), num_threads=2))


def test_the_layout_of_pascal_voc_is_refused(tmp_path: Path) -> None:
    for name in ("JPEGImages/1.jpg", "SegmentationClass/1.png"):
        _write(tmp_path / name)
    with pytest.raises(DataError, match="PASCAL VOC"):
        open_labelled(tmp_path)
