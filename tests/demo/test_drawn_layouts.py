"""Drawn data sets have the layouts of the real ones, as other readers see them."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from orl_fast.demo.layouts import draw_layouts


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return draw_layouts(tmp_path_factory.mktemp("layouts"), num_images=10, num_classes=3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_coco_as_its_own_tools_read_it(drawn: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(drawn["coco"] / "annotations" / "instances_train2017.json"))
    assert len(coco.imgs) == 10
    assert sum(entry["iscrowd"] for entry in coco.anns.values()) == 1
    assert any(not coco.imgToAnns[image] for image in coco.imgs)
    for entry in coco.anns.values():
        mask = coco.annToMask(entry)
        ys, xs = np.nonzero(mask)
        x, y, width, height = entry["bbox"]
        assert np.allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x, y, x + width, y + height], atol=2)
        assert mask.sum() == pytest.approx(entry["area"], rel=0.1)
    for image in coco.imgs.values():
        with Image.open(drawn["coco"] / "train2017" / image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"])


def test_vocs_lists_agree_with_its_annotations(drawn: dict[str, Path]) -> None:
    root = drawn["voc"] / "VOCdevkit" / "VOC2007"
    numbers = (root / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    assert len(numbers) == 10
    for path in (root / "ImageSets" / "Main").glob("*_trainval.txt"):
        lines = [line.split() for line in path.read_text().splitlines()]
        assert [number for number, _ in lines] == numbers
        for number, label in lines:
            entry = ElementTree.parse(root / "Annotations" / f"{number}.xml")
            own = [item.findtext("difficult") for item in entry.iter("object") if item.findtext("name") == path.name.split("_")[0]]
            assert label == ("-1" if not own else "0" if set(own) == {"1"} else "1")


def test_lists_name_files_that_are_there(drawn: dict[str, Path]) -> None:
    listed = (drawn["lists"] / "10percent.txt").read_text().split()
    assert all((drawn["imagenet"] / "train" / name.split("_")[0] / name).is_file() for name in listed)
    lines = (drawn["places"] / "val_places205.csv").read_text().splitlines()
    assert all((drawn["places"] / "images" / line.split()[0]).is_file() for line in lines)
    images = json.loads((drawn["inat"] / "train2018.json").read_text())["images"]
    assert all((drawn["inat"] / image["file_name"]).is_file() for image in images)


def test_what_is_drawn_is_kept(drawn: dict[str, Path]) -> None:
    photo = drawn["places"] / "images" / "t" / "triangle0" / "train_00000000.jpg"
    before = photo.stat().st_mtime_ns
    assert draw_layouts(drawn["coco"].parent, num_images=10, num_classes=3) == drawn
    assert photo.stat().st_mtime_ns == before
