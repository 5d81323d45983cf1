"""Labelled images of the real layouts, packed, with the class of every row; and what is refused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from orl_fast.console import log
from orl_fast.errors import DataError, StaleError
from orl_fast.evals.labelled_shards import LabelledShards, LabelledShardsOptions, Part, open_labelled_shards
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.shards.labels import INFO_NAME, TABLE_NAME, read_classes
from tests.evals.drawn_classes import context, draw_image, draw_splits
from tests.evals.test_layouts import warnings  # noqa: F401  a fixture

CLASSES = {"n01440764": (3, 2), "n01443537": (2, 1), "n01484850": (2, 1)}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    draw_splits(tmp_path / "imagenet", CLASSES)
    return tmp_path / "imagenet"


def _open(data: Path, **options: Path) -> LabelledShards:
    return open_labelled_shards(data, LabelledShardsOptions(**options), context())


def _named(part: Part, classes: Sequence[str]) -> dict[str, str]:
    return {Path(part.index.file_names[row]).name: classes[part.labels[row]] for row in part.rows}


def _expected(part: int) -> dict[str, str]:
    return {f"{name}_{i}.jpg": name for name, counts in CLASSES.items() for i in range(counts[part])}


def test_class_folders_are_packed_once_and_labels_are_those_of_the_file_names(imagenet: Path) -> None:
    found = _open(imagenet)
    assert found.classes == tuple(CLASSES)
    assert found.dataset == "imagenet"
    assert (len(found.train), len(found.val), found.num_skipped) == (7, 4, 0)
    for part, folder in ((found.train, imagenet / "train"), (found.val, imagenet / "val")):
        for row in part.rows.tolist():
            name = found.train.index.file_names[row]
            assert name.split("/")[0] == found.classes[part.labels[row]]
            assert (folder / name).is_file()
    index = ShardIndex.open(Path("shards/imagenet-labelled"))
    column = read_classes(index)
    assert column is not None
    assert column.classes == found.classes
    assert np.array_equal(column.labels, np.maximum(found.train.labels, found.val.labels))
    before = [path.stat().st_mtime_ns for path in sorted(index.path.iterdir()) if path.is_file()]
    again = _open(imagenet)
    assert again.fingerprint == found.fingerprint
    assert [path.stat().st_mtime_ns for path in sorted(index.path.iterdir()) if path.is_file()] == before
    for data in (index.path, Path("imagenet-labelled")):  # the packed folder in place of the images: by its column
        direct = _open(data)
        assert (direct.fingerprint, direct.classes) == (found.fingerprint, found.classes)
    for name in (INFO_NAME, TABLE_NAME):
        (index.path / name).unlink()
    assert _open(index.path).fingerprint == found.fingerprint  # by the names of folders and files


def test_one_folder_packed_as_a_whole_and_two_that_were_packed_apart(imagenet: Path) -> None:
    expected = _open(imagenet)
    write_shards([imagenet], Path("whole"), num_workers=1)
    write_shards([imagenet / "train"], Path("a"), num_workers=1)
    write_shards([imagenet / "val"], Path("b"), num_workers=1)
    for found in (_open(Path("whole")), _open(Path("a"), val=Path("b"))):
        assert found.classes == expected.classes
        for part, other in ((found.train, expected.train), (found.val, expected.val)):
            assert sorted(part.labels[part.rows].tolist()) == sorted(other.labels[other.rows].tolist())
    with pytest.raises(DataError, match="no image is in a class folder of train/ and of val/"):
        _open(Path("a"))


def test_a_flat_val_folder_is_refused_and_used_with_a_list(imagenet: Path) -> None:
    lines = []
    for c, name in enumerate(CLASSES):
        for file in sorted((imagenet / "val" / name).iterdir()):
            file.rename(imagenet / "val" / f"ILSVRC2012_{file.name}")
            lines.append(f"ILSVRC2012_{file.name} {c}")
        (imagenet / "val" / name).rmdir()
    with pytest.raises(DataError, match=r"val: holds no class folders, but 4 images; .* --val-list FILE"):
        _open(imagenet)
    assert not Path("shards").exists()
    (imagenet / "val.txt").write_text("\n".join(lines))
    found = _open(imagenet, val_list=imagenet / "val.txt")
    assert _named(found.val, found.classes) == {line.split()[0]: line.split()[0].split("_")[1] for line in lines}
    shutil.rmtree("shards")
    (imagenet / "meta").mkdir()
    (imagenet / "val.txt").rename(imagenet / "meta" / "val_labeled.txt")
    names = [path.relative_to(imagenet / "train") for path in sorted((imagenet / "train").rglob("*.jpg"))]
    (imagenet / "meta" / "train_labeled.txt").write_text("".join(f"{name} {list(CLASSES).index(name.parent.name)}\n" for name in names))
    by_lists = _open(imagenet)  # OpenSelfSup's layout
    assert (by_lists.classes, len(by_lists.train)) == (("0", "1", "2"), 7)
    assert np.array_equal(by_lists.val.labels, found.val.labels)
    (imagenet / "val.txt").write_text("\n".join(f"{line.split()[0]} {int(line.split()[1]) + 1}" for line in lines))
    with pytest.raises(DataError, match="label 3 is out of range: there are 3 classes"):
        _open(imagenet, val_list=imagenet / "val.txt")


def test_classes_without_a_folder_train_and_a_train_list_with_a_val_folder(imagenet: Path) -> None:
    expected = _open(imagenet)
    apart = _open(imagenet / "train", val=imagenet / "val", shards=Path("apart"))
    assert [part.labels.tolist() for part in (apart.train, apart.val)] == [part.labels.tolist() for part in (expected.train, expected.val)]
    lines = [
        f"{path.relative_to(imagenet / 'train')} {list(CLASSES).index(path.parent.name)}" for path in (imagenet / "train").rglob("*.jpg")
    ]
    (imagenet / "train.txt").write_text("\n".join(lines[1:]))
    found = _open(imagenet, train_list=imagenet / "train.txt")
    assert (len(found.train), found.num_skipped, found.classes) == (6, 1, expected.classes)
    assert {found.train.index.file_names[row].split("/")[0] for row in found.train.rows[found.train.labels[found.train.rows] == 2]} == {
        "n01484850"
    }


def _places(root: Path) -> Path:
    seed = 0
    for name in ("a/abbey", "a/airport", "b/bar"):
        for i in range(4):
            draw_image(root / "images256" / name / f"gsun_{i}.jpg", seed=seed)
            seed += 1
    for split, chosen in (("train", (0, 1, 2)), ("val", (3,))):
        lines = [f"{name}/gsun_{i}.jpg {label}" for label, name in enumerate(("a/abbey", "a/airport", "b/bar")) for i in chosen]
        (root / f"{split}_places205.csv").write_text("\n".join(lines) + "\n")
    return root


def test_places205_by_its_lists(tmp_path: Path) -> None:
    root = _places(tmp_path / "places")
    draw_image(root / "images256" / "c" / "unlisted.jpg", seed=99)
    found = _open(root)
    assert found.classes == ("0", "1", "2")
    assert (len(found.train), len(found.val), found.num_skipped, found.dataset) == (9, 3, 1, "places205")
    for part in (found.train, found.val):
        names = {0: "a/abbey", 1: "a/airport", 2: "b/bar"}
        assert all(part.index.file_names[row].startswith(names[part.labels[row]]) for row in part.rows.tolist())
    lists = {"train_list": root / "train_places205.csv", "val_list": root / "val_places205.csv"}
    packed = _open(Path("shards/places-labelled"), **lists)  # type: ignore[arg-type]
    assert packed.fingerprint == found.fingerprint
    write_shards([root / "images256" / "a", root / "images256" / "b"], Path("parts"), num_workers=1)
    assert len(_open(Path("parts"), **lists).train) == 9  # type: ignore[arg-type]
    for path in lists.values():
        path.write_text("".join(f"{root.resolve()}/images256/{line}\n" for line in path.read_text().splitlines()))
    for data in (root, Path("parts")):
        found = _open(data, **lists)  # type: ignore[arg-type]
        assert (len(found.train), len(found.val), found.classes) == (9, 3, ("0", "1", "2"))


def test_lists_that_share_images_or_do_not_fit_the_data_are_refused(tmp_path: Path) -> None:
    root = _places(tmp_path / "places")
    val = root / "val_places205.csv"
    right = val.read_text()
    val.write_text(right + "a/abbey/gsun_0.jpg 0\n")
    with pytest.raises(DataError, match=r"1 images are to be trained on and to be validated, for example a/abbey/gsun_0\.jpg"):
        _open(root)
    val.write_text(right + "b/bar/absent.jpg 2\n")
    with pytest.raises(DataError, match=r"1 of its 4 images are not in .*images256, for example b/bar/absent\.jpg"):
        _open(root)
    val.write_text(right.replace("b/bar/gsun_3.jpg 2", "b/bar/gsun_3.jpg 205"))
    with pytest.raises(DataError, match=r"1 classes that no training image has \(205\)"):
        _open(root)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match=r"are not below .*elsewhere; name their folder with --images"):
        _open(root, images=tmp_path / "elsewhere")


def test_inaturalist_by_its_json(tmp_path: Path) -> None:
    root, seed = tmp_path / "inat", 0
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        images, annotations = [], []
        for i in numbers:
            name = f"train_val2018/{('Aves', 'Plantae')[i % 2]}/{i % 2}/{i}.jpg"
            draw_image(root / name, seed=seed)
            seed += 1
            images.append({"id": i, "file_name": name, "width": 48, "height": 40})
            annotations.append({"id": i, "image_id": i, "category_id": i % 2})
        categories = [{"id": 0, "name": "owl"}, {"id": 1, "name": "oak"}, {"id": 2, "name": "unseen"}]
        (root / f"{split}2018.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    draw_image(root / "test2018" / "x.jpg", seed=77)
    found = _open(root)
    assert found.classes == ("owl", "oak")
    assert found.dataset == "inat18"
    assert _named(found.train, found.classes) == {"0.jpg": "owl", "1.jpg": "oak", "2.jpg": "owl", "3.jpg": "oak"}
    assert _named(found.val, found.classes) == {"4.jpg": "owl", "5.jpg": "oak"}
    assert len(found.train.index) == 6  # test2018/ is not packed
    shutil.rmtree(root / "train_val2018" / "Aves")
    shutil.rmtree("shards")
    with pytest.raises(DataError, match=r"train2018\.json: 2 of its 4 images are not in"):
        _open(root)


def test_system_folders_broken_files_and_copies_are_left_out_with_a_count(imagenet: Path, warnings: list[str]) -> None:  # noqa: F811
    draw_image(imagenet / "train" / "@eaDir" / "1.jpg", seed=100)
    draw_image(imagenet / "train" / "n01440764" / "@eaDir" / "1.jpg" / "SYNOFILE_THUMB_M.jpg", seed=101)
    draw_image(imagenet / "train" / "__MACOSX" / "n" / "1.jpg", seed=102)
    (imagenet / "train" / "n01443537" / "broken.jpg").write_bytes(b"no image")
    shutil.copy(imagenet / "val" / "n01440764" / "n01440764_0.jpg", imagenet / "train" / "n01440764" / "again.jpg")
    found = _open(imagenet)
    assert found.classes == tuple(CLASSES)
    assert _named(found.train, found.classes) == _expected(0)
    assert (len(found.val), found.num_skipped) == (4, 5)
    assert any("3 images in hidden or system folders" in message for message in warnings)
    assert any("1 training images are validation images too, byte for byte" in message for message in warnings)


def test_a_validation_part_that_is_the_training_part_is_refused(imagenet: Path) -> None:
    shutil.rmtree(imagenet / "val")
    shutil.copytree(imagenet / "train", imagenet / "val")
    with pytest.raises(DataError, match="7 of 7 training images are validation images too"):
        _open(imagenet)
    shutil.rmtree(imagenet / "val")
    shutil.rmtree("shards")
    (imagenet / "val").symlink_to(imagenet / "train")
    with pytest.raises(DataError, match="7 images are to be trained on and to be validated"):
        _open(imagenet)


def test_what_is_no_labelled_data_is_refused(imagenet: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        _open(tmp_path / "missing")
    with pytest.raises(DataError, match="has no train/"):
        _open(tmp_path / "cwd")
    with pytest.raises(DataError, match="has no val/"):
        draw_image(tmp_path / "half" / "train" / "a" / "1.jpg", seed=0)
        _open(tmp_path / "half")
    draw_image(imagenet / "val" / "n99999999" / "x.jpg", seed=50)
    with pytest.raises(DataError, match=r"1 classes that no training image has \(n99999999\)"):
        _open(imagenet)
    draw_splits(tmp_path / "one", {"cat": (2, 1)})
    with pytest.raises(DataError, match="1 classes have training images; at least 2"):
        _open(tmp_path / "one")
    for part in ("train", "val"):
        draw_image(tmp_path / "nested" / part / "a" / "abbey" / "1.jpg", seed=0)
        draw_image(tmp_path / "nested" / part / "a" / "airport" / "1.jpg", seed=1)
    with pytest.raises(DataError, match="which of them are classes is not known"):
        _open(tmp_path / "nested")
    assert not Path("shards").exists()  # nothing was packed before it was refused


def test_other_images_in_the_shard_folder_and_a_column_of_other_images_are_refused(imagenet: Path) -> None:
    _open(imagenet)
    labels = Path("shards/imagenet-labelled") / INFO_NAME
    draw_image(imagenet / "train" / "n01440764" / "new.jpg", seed=60)
    with pytest.raises(StaleError, match=r"packed from other images than .* holds now; remove it, or choose another with --shards"):
        _open(imagenet)
    found = _open(imagenet, shards=Path("other"))
    assert len(found.train) == 8
    for name in (INFO_NAME, TABLE_NAME):
        shutil.copy(labels.with_name(name), Path("other") / name)
    with pytest.raises(StaleError, match=r"labels\.json: made from images .* this folder holds"):
        _open(Path("other"))
    assert len(_open(imagenet, shards=Path("other")).train) == 8  # writes the right one
    Path("full").mkdir()
    Path("full/notes.txt").write_text("not a dataset")
    with pytest.raises(DataError, match="full: is not empty and not a dataset; choose another folder with --shards"):
        _open(imagenet, shards=Path("full"))
    table = np.load(Path("other") / TABLE_NAME)
    table["label"][0] = 2
    np.save(Path("other") / TABLE_NAME, table)
    with pytest.raises(DataError, match=r"labels\.json: damaged \(labels\.npy does not fit labels\.json\)"):
        _open(Path("other"))


def test_what_is_taken_is_logged(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(log, "info", lambda message, *values: messages.append(message % values))
    _open(imagenet)
    assert any("packing 11 images" in message and "free" in message for message in messages)
    assert any("7 images of 3 classes to train on, 4 of 3 to validate; 0 images not used" in message for message in messages)
