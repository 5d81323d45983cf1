import json
from pathlib import Path

import numpy as np
import pytest

from orl_fast.demo.scenes import SIDE_PX, ScenePainter, write_scenes


@pytest.mark.parametrize(("held_out", "themed"), [(False, True), (False, False), (True, False)])
def test_digits_lie_inside_apart_and_stand_out(held_out: bool, themed: bool) -> None:
    painter = ScenePainter(seed=3, held_out_digits=held_out, themed=themed)
    for number in range(12):
        scene = painter.paint(number)
        assert scene.image.shape == (SIDE_PX, SIDE_PX, 3)
        assert 4 <= len(scene.boxes) == len(scene.labels) <= 7
        covered = np.zeros((SIDE_PX, SIDE_PX), int)
        for x1, y1, x2, y2 in scene.boxes.tolist():
            assert 0 <= x1 < x2 <= SIDE_PX
            assert 0 <= y1 < y2 <= SIDE_PX
            covered[y1:y2, x1:x2] += 1
            around = scene.image[max(0, y1 - 4) : y2 + 4, max(0, x1 - 4) : x2 + 4]
            assert np.ptp(around, axis=(0, 1)).max() > 50  # in some channel
        assert covered.max() == 1


def test_a_scene_depends_on_seed_part_and_number_alone() -> None:
    first = ScenePainter(seed=5, held_out_digits=False, themed=True)
    first.paint(0)
    again = ScenePainter(seed=5, held_out_digits=False, themed=True).paint(1)
    assert np.array_equal(first.paint(1).image, again.image)
    assert not np.array_equal(ScenePainter(seed=6, held_out_digits=False, themed=True).paint(1).image, again.image)
    assert not np.array_equal(ScenePainter(seed=5, held_out_digits=True, themed=True).paint(1).image, again.image)


def test_themes_hold_few_classes_and_labelled_scenes_all() -> None:
    def distinct(themed: bool) -> float:
        painter = ScenePainter(seed=0, held_out_digits=False, themed=themed)
        return float(np.mean([len(set(painter.paint(i).labels.tolist())) for i in range(40)]))

    assert distinct(True) < 3.2
    assert distinct(False) > 4


def test_written_scenes_carry_coco_boxes_and_are_not_drawn_twice(tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    write_scenes(folder, num_scenes=3, seed=1, labelled=True)
    values = json.loads((folder / "annotations.json").read_text())
    scene = ScenePainter(seed=1, held_out_digits=False, themed=False).paint(2)
    boxes_xywh = np.array([entry["bbox"] for entry in values["annotations"] if entry["image_id"] == 2])
    assert (boxes_xywh[:, :2] + boxes_xywh[:, 2:]).tolist() == scene.boxes[:, 2:].tolist()
    files = sorted((folder / "images").iterdir())
    assert [file.name for file in files] == [entry["file_name"] for entry in values["images"]]
    before = files[0].stat().st_mtime_ns
    write_scenes(folder, num_scenes=3, seed=1, labelled=True)
    assert files[0].stat().st_mtime_ns == before
    write_scenes(folder, num_scenes=2, seed=1, labelled=True)
    assert len(list((folder / "images").iterdir())) == 2
