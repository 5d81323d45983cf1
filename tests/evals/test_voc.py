"""VOC's layout: the labels of either source, the places it may be given by, and what is refused or skipped."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from orl_fast.errors import DataError
from orl_fast.evals.voc import read_voc
from tests.drawn_voc import CLASSES, draw_images, draw_voc, drawn_labels, write_annotations, write_class_files


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return draw_voc(tmp_path / "data")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("orl_fast"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def _expected(split: str, num: int) -> list[list[int]]:
    return [[of[name] for name in CLASSES] for of in drawn_labels(split, num).values()]


def test_labels_are_those_of_the_class_files(voc: Path, warnings: pytest.LogCaptureFixture) -> None:
    for given in (voc, voc.parent, voc.parent.parent, voc.parent.parent.parent):
        found = read_voc(given)
        assert found.classes == CLASSES
        assert found.trainval.labels.tolist() == _expected("trainval", 24)
        assert found.test.labels.tolist() == _expected("test", 16)
        assert [path.name for path in found.test.paths[:2]] == ["005000.jpg", "005001.jpg"]
    assert "2 classes; VOC2007 has 20" in warnings.text


def test_annotations_mean_the_same(voc: Path, warnings: pytest.LogCaptureFixture) -> None:
    from_files = read_voc(voc)
    for split, num in (("trainval", 24), ("test", 16)):
        write_annotations(voc, split, drawn_labels(split, num))
        for name in CLASSES:
            (voc / "ImageSets" / "Main" / f"{name}_{split}.txt").unlink()
    from_annotations = read_voc(voc)
    assert from_annotations.classes == from_files.classes  # no parts, which have names too
    for split in ("trainval", "test"):
        one, other = getattr(from_files, split), getattr(from_annotations, split)
        assert one.paths == other.paths
        assert np.array_equal(one.labels, other.labels)
    assert "come from Annotations" in warnings.text
    (voc / "Annotations" / "000003.xml").write_text("<annotation><object>")
    (voc / "Annotations" / "000007.xml").unlink()
    found = read_voc(voc).trainval
    assert (len(found.paths), found.num_missing) == (22, 2)
    assert "2 images of trainval.txt without labels, skipped: 000003, 000007" in warnings.text


def test_trainval_and_test_in_different_devkits(tmp_path: Path) -> None:
    for split, num in (("trainval", 8), ("test", 6)):
        root = tmp_path / f"VOC{split}_06-Nov-2007" / "VOCdevkit" / "VOC2007"
        write_class_files(root, split, drawn_labels(split, num))
        draw_images(root, drawn_labels(split, num))
    found = read_voc(tmp_path)
    assert (len(found.trainval.paths), len(found.test.paths)) == (8, 6)
    (tmp_path / "link").symlink_to(tmp_path / "VOCtest_06-Nov-2007")
    assert len(read_voc(tmp_path).test.paths) == 6
    shutil.copytree(tmp_path / "VOCtest_06-Nov-2007", tmp_path / "copy")
    with pytest.raises(DataError, match="test is there 2 times"):
        read_voc(tmp_path)


def test_what_is_not_voc_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; looked for a folder with JPEGImages"):
        read_voc(tmp_path / "none")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"not PASCAL VOC; looked for a folder with JPEGImages/ and ImageSets/Main/"):
        read_voc(tmp_path)


def test_another_year_is_refused_and_ignored_where_2007_is_there(voc: Path) -> None:
    later = voc.with_name("VOC2012")
    write_class_files(later, "trainval", drawn_labels("trainval", 4))
    assert len(read_voc(voc.parent).trainval.paths) == 24
    with pytest.raises(DataError, match="holds VOC2012; this is the protocol of VOC2007"):
        read_voc(later)
    renamed = voc.parent / "mine"
    labels = {f"2008_{int(name):06d}": of for name, of in drawn_labels("trainval", 4).items()}
    write_class_files(renamed, "trainval", labels)
    with pytest.raises(DataError, match=r"images of a later year \(2008_000000"):
        read_voc(renamed)


def test_a_missing_split_is_refused(voc: Path) -> None:
    for name in CLASSES:
        (voc / "ImageSets" / "Main" / f"{name}_test.txt").unlink()
    with pytest.raises(DataError, match=r"no labels of test \(it is in VOCtest_06-Nov-2007.tar\)"):
        read_voc(voc)


def test_an_image_in_both_splits_is_refused(voc: Path) -> None:
    file = voc / "ImageSets" / "Main" / "disk_test.txt"
    file.write_text(file.read_text() + "000001  1\n")
    with pytest.raises(DataError, match=r"1 images are in both trainval and test \(000001\)"):
        read_voc(voc)


def test_the_same_picture_under_two_names_is_told(voc: Path, warnings: pytest.LogCaptureFixture) -> None:
    shutil.copy(voc / "JPEGImages" / "000002.jpg", voc / "JPEGImages" / "005003.jpg")
    read_voc(voc)
    assert "1 images are in both trainval and test, under other names: the score is too high: 000002 = 005003" in warnings.text


def test_images_without_a_file_are_skipped_and_counted(voc: Path, warnings: pytest.LogCaptureFixture) -> None:
    for name in ("000000", "000005"):
        (voc / "JPEGImages" / f"{name}.jpg").unlink()
    found = read_voc(voc).trainval
    assert (found.num_missing, len(found.paths), len(found.labels)) == (2, 22, 22)
    assert "2 images of trainval are not in JPEGImages, skipped: 000000, 000005" in warnings.text
    for file in (voc / "JPEGImages").glob("005*.jpg"):
        file.unlink()
    with pytest.raises(DataError, match="none of the 16 images of test is in JPEGImages"):
        read_voc(voc)


def test_odd_lines_are_skipped_and_a_missing_one_is_difficult(voc: Path, warnings: pytest.LogCaptureFixture) -> None:
    file = voc / "ImageSets" / "Main" / "disk_trainval.txt"
    lines = file.read_text().splitlines()
    lines[1] = "000001 yes"
    file.write_text("\ufeff" + "\r\n".join([*lines, "000002 -1", ""]), "utf-8")
    labels = read_voc(voc).trainval.labels[:, 1]
    assert labels.tolist()[:4] == [1, 0, -1, -1]
    assert "1 lines without an image and a label of 1, 0 or -1, skipped: line 2" in warnings.text
    assert "1 images listed again, the first label kept: 000002" in warnings.text
    assert "1 images of other classes' files are not in it, difficult for disk: 000001" in warnings.text
