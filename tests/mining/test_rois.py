"""RoIs of a table, what mining in this process leaves behind, and ground-truth boxes in place of proposals."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mining_world import World, draw_scene, with_mining
from plain_boxes import random_boxes

from orl_fast.boxes import filter_proposals
from orl_fast.errors import DataError
from orl_fast.mining.executor import Executor
from orl_fast.mining.pipeline import Stage
from orl_fast.mining.rois import filter_table, propose_shards
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable

CONFIG_OBJECTS = with_mining(proposals="coco-annotations", min_side_px=4)


def test_filter_of_a_table_is_the_filter_of_each_image():
    rng = np.random.default_rng(1)
    lists = [random_boxes(rng, int(num)) if num else np.empty((0, 4), np.int16) for num in rng.integers(0, 60, 50)]
    heights, widths = rng.integers(300, 700, 50).astype(np.int32), rng.integers(300, 700, 50).astype(np.int32)
    heights[0], lists[0] = 50_000, np.empty((0, 4), np.int16)  # beyond what boxes hold
    limits = {"min_side_px": 50, "max_rois": 5}
    rois = filter_table(BoxTable.from_lists(lists), heights=heights, widths=widths, limits=limits)
    for image, boxes in enumerate(lists):
        frame = np.minimum([widths[image], heights[image]] * 2, 32_767)
        boxes = np.clip(boxes, 0, frame) if len(boxes) else np.array([[0, 0, *frame[:2]]])
        assert rois.of(image).tolist() == boxes[filter_proposals(boxes, **limits)].tolist()


def test_proposing_in_this_process_keeps_opencvs_threads(world: World, tmp_path: Path) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        list(propose_shards(tmp_path, [0], index=world.index, backend="fast", seed=0, executor=Executor()))
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, ShardIndex]:
    """Six scenes in COCO's layout: an object, one of fractional size, a crowd, none at all, one beyond the edge, a wrong size."""
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "train2017").mkdir()
    images = []
    for i in range(6):
        scene = draw_scene(i)
        scene.save(tmp_path / "coco" / "train2017" / f"{i:012d}.jpg")
        width, height = scene.size if i != 5 else (9, 9)
        images.append({"file_name": f"{i:012d}.jpg", "id": 100 + i, "width": width, "height": height})
    boxes = {
        0: [[3, 4, 20, 10], [30, 20, 9, 9]],
        1: [[3.7, 4.2, 20.1, 10.3]],
        2: [[1, 1, 30, 30]],
        4: [[40, 30, 500, 500]],
        5: [[1, 1, 6, 6]],
    }
    entries = [{"image_id": 100 + i, "bbox": box, "iscrowd": int(i == 2)} for i, found in boxes.items() for box in found]
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": entries}))
    write_shards([tmp_path / "coco"], tmp_path / "shards", shard_size=4, num_workers=1)
    return file, ShardIndex.open(tmp_path / "shards")


def test_objects_become_rois_and_images_without_any_are_taken_whole(coco: tuple[Path, ShardIndex], world: World, tmp_path: Path):
    _, index = coco
    stage = Stage(index=index, folder=tmp_path / "mined", config=CONFIG_OBJECTS, checkpoint=world.checkpoint)
    stage.run(["proposals", "rois"])
    rois = BoxTable.open(tmp_path / "mined" / "rois")
    whole = np.stack([index.widths, index.heights], axis=1)
    assert rois.of(0).tolist() == [[3, 4, 23, 14], [30, 20, 39, 29]]
    assert rois.of(1).tolist() == [[3, 4, 24, 15]]
    assert [rois.of(i).tolist() for i in (2, 3, 5)] == [[[0, 0, *whole[i].tolist()]] for i in (2, 3, 5)]
    assert rois.of(4).tolist() == [[40, 30, *whole[4].tolist()]]


def test_a_changed_annotation_file_makes_new_proposals(coco: tuple[Path, ShardIndex], world: World, tmp_path: Path):
    file, index = coco
    stage = Stage(index=index, folder=tmp_path / "mined", config=CONFIG_OBJECTS, checkpoint=world.checkpoint)
    stage.run(["proposals", "rois"])
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][1:]
    file.write_text(json.dumps(content))
    stage.run(["proposals", "rois"])
    assert BoxTable.open(tmp_path / "mined" / "rois").of(0).tolist() == [[30, 20, 39, 29]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "not a COCO-style annotation file"),
        ({"images": [], "annotations": []}, "none of the packed images"),
        ("[", "JSON"),
    ],
)
def test_files_without_boxes_are_refused(content, message: str, coco: tuple[Path, ShardIndex], world: World, tmp_path: Path):
    _, index = coco
    file = tmp_path / "other.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    stage = Stage(index=index, folder=tmp_path / "mined", config=CONFIG_OBJECTS, checkpoint=world.checkpoint, annotations=file)
    with pytest.raises(DataError, match=message):
        stage.run(["proposals"])


def test_ids_written_as_text_are_joined_and_odd_entries_skipped(coco: tuple[Path, ShardIndex], world: World, tmp_path: Path):
    """Formerly no boxes were found for ids of the other type, and one odd entry cost the whole file."""
    file, index = coco
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["image_id"] = str(entry["image_id"])
    content["annotations"] += [{"image_id": 100, "bbox": []}, {"image_id": 7, "bbox": [1, 1, 5, 5]}, {"image_id": 100}]
    file.write_text(json.dumps(content))
    stage = Stage(index=index, folder=tmp_path / "mined", config=CONFIG_OBJECTS, checkpoint=world.checkpoint)
    stage.run(["proposals", "rois"])
    assert BoxTable.open(tmp_path / "mined" / "rois").of(0).tolist() == [[3, 4, 23, 14], [30, 20, 39, 29]]


def test_folders_without_an_annotation_file_say_so(world: World, tmp_path: Path):
    stage = Stage(index=world.index, folder=tmp_path, config=CONFIG_OBJECTS, checkpoint=world.checkpoint)
    with pytest.raises(DataError, match="--annotations FILE"):
        stage.run(["proposals"])
