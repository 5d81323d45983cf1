"""CorLoc against cases counted by hand; tables mined by another encoder are not scored as this one's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.errors import DataError, StaleError
from orl_fast.evals import Context
from orl_fast.evals.corloc import Options, PackedObjects, localization, packed_objects, run, summary
from orl_fast.mining.executor import Executor
from orl_fast.mining.pipeline import Stage
from orl_fast.models import Encoder, random_encoder
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, PairTable, table_info
from tests.mining.mining_world import draw_scene

MINING = {"min_side_px": 12, "max_rois": 6, "roi_size_px": 32, "crop_px": 32, "resize_px": 36, "num_neighbors": 2, "encode_batch": 32}


def _table(*boxes: list[list[int]]) -> BoxTable:
    return BoxTable.from_lists([np.array(entry, np.int16).reshape(-1, 4) for entry in boxes])


def test_best_pairs_counted_by_hand() -> None:
    """Three images of two RoIs each; the last has no object."""
    rois = _table([[0, 0, 10, 10], [20, 20, 40, 40]], [[0, 0, 10, 10], [50, 0, 60, 10]], [[0, 0, 10, 10], [5, 5, 15, 15]])
    pairs = PairTable(
        neighbors=np.array([[1, 2], [0, 2], [0, 1]]),
        first=np.array([[0, 2], [3, 4], [5, 6]]),
        count=np.array([[2, 1], [1, 1], [1, 1]], np.int32),
        query_roi=np.array([1, 0, 0, 1, 0, 0, 0], np.int16),
        partner_roi=np.array([1, 0, 0, 1, 0, 0, 0], np.int16),
        similarities=np.array([0.9, 0.5, 0.4, 0.3, 0.8, 0.1, 0.2], np.float32),
    )
    objects = PackedObjects(
        # Image 0: its second RoI covers half of the first object, and nothing covers the second. Image 1: only its second RoI is on one.
        boxes=[np.array([[20.0, 20, 40, 60], [100, 100, 120, 120]]), np.array([[49.0, 0, 60, 10]]), np.empty((0, 4))],
        labels=[np.array([4, 4]), np.array([4]), np.empty(0, np.int64)],
    )
    values = localization(rois, pairs, objects)
    assert values["corloc"] == 0.5  # image 0's best pair is its RoI 1, on the object at exactly 0.5; image 1's is its RoI 0
    assert values["random_roi"] == 0.5
    assert values["best_roi"] == 1
    assert values["recall"] == pytest.approx(2 / 3)
    assert values["same_category"] == 1  # of image 0's pair with image 1
    assert (values["num_images"], values["num_objects"], values["num_images_without_objects"], values["num_pairs_on_objects"]) == (
        2,
        3,
        1,
        1,
    )
    stricter = localization(rois, pairs, objects, min_iou=0.51)
    assert (stricter["corloc"], stricter["num_pairs_on_objects"]) == (0, 0)
    assert "same_category" not in stricter
    assert summary(stricter).endswith("known categories: 0.")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(load_config("demo", overrides=[f"mining.{key}={value}" for key, value in MINING.items()]))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Seven photographs with one object each, but for the last; the second is stored rotated, the third has another size."""
    root = tmp_path_factory.mktemp("corloc")
    (root / "coco" / "val").mkdir(parents=True)
    images, objects = [], []
    for i in range(7):
        photo = draw_scene(i).resize((80, 60))
        exif = Image.Exif()
        exif[0x0112] = 3 if i == 1 else 1
        photo.save(root / "coco" / "val" / f"{i}.jpg", exif=exif)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 80 if i != 2 else 70, "height": 60})
        objects.append({"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [5, 10, 30, 20], "iscrowd": int(i == 6)})
    objects.append({"id": 8, "image_id": 0, "category_id": 9, "bbox": [90, 10, 5, 5]})  # outside
    images.append({"id": 50, "file_name": "absent.jpg"})
    objects.append({"id": 9, "image_id": 50, "category_id": 1, "bbox": [1, 1, 9, 9]})
    (root / "coco" / "annotations").mkdir()
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": objects, "categories": categories}
    (root / "coco" / "annotations" / "instances_val.json").write_text(json.dumps(content))
    write_shards([root / "coco"], root / "shards", num_workers=1)
    return ShardIndex.open(root / "shards")


def test_objects_of_packed_images(packed: ShardIndex) -> None:
    found = packed_objects(packed)
    rows = {name: row for row, name in enumerate(packed.file_names)}
    assert found.boxes[rows["0.jpg"]].tolist() == [[5, 10, 35, 30]]
    assert found.boxes[rows["1.jpg"]].tolist() == [[80 - 35, 60 - 30, 80 - 5, 60 - 10]]
    assert [len(found.boxes[rows[f"{i}.jpg"]]) for i in range(7)] == [1, 1, 0, 1, 1, 1, 0]
    assert [found.labels[rows[f"{i}.jpg"]].tolist() for i in (0, 1, 3)] == [[0], [1], [1]]
    assert (found.num_skipped_images, found.num_skipped_objects) == (2, 3)


def test_pairs_of_another_encoder_are_mined_again(packed: ShardIndex, encoder: Encoder, tmp_path: Path) -> None:
    context = Context(device=torch.device("cpu"), work=tmp_path / "work")
    options = Options(mined=tmp_path / "mined")
    values = run(encoder, packed.path, options, context)  # nothing is mined yet: all steps
    assert run(encoder, packed.path, options, context) == values
    assert values["num_images"] == 5
    assert 0 <= values["corloc"] <= values["best_roi"] <= 1

    config = load_config("demo", overrides=[f"mining.{key}={value}" for key, value in MINING.items()])
    other = random_encoder(config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})}))
    Stage(index=packed, folder=tmp_path / "mined", config=config, checkpoint=Path("other"), own_encoder=other, executor=Executor()).run()
    assert run(encoder, packed.path, options, Context(device=torch.device("cpu"), work=tmp_path / "again")) == values
    again = table_info(tmp_path / "again" / "mined" / "pairs")
    assert again is not None
    assert again.made_from["encoder"] == encoder.fingerprint
    assert not (tmp_path / "again" / "mined" / "proposals").exists()  # the RoIs that were there
    run(other, packed.path, options, Context(device=torch.device("cpu"), work=tmp_path / "unused"))
    assert not (tmp_path / "unused").exists()

    bare = Encoder(encoder.backbone, None, name=encoder.name, mining=encoder.mining)
    assert run(bare, packed.path, options, Context(device=torch.device("cpu"), work=tmp_path / "bare"))["recall"] == values["recall"]


def test_rois_of_other_images_and_data_without_annotations_are_refused(packed: ShardIndex, encoder: Encoder, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        draw_scene(i).save(photos / f"{i}.png")
    write_shards([photos], tmp_path / "shards", num_workers=1)
    context = Context(device=torch.device("cpu"), work=tmp_path / "work")
    with pytest.raises(DataError, match="packed without an annotation file; name one with --annotations"):
        run(encoder, tmp_path / "shards", Options(), context)
    run(encoder, packed.path, Options(), context)
    (tmp_path / "shards" / "mined").mkdir()
    (tmp_path / "work" / "mined" / "rois").rename(tmp_path / "shards" / "mined" / "rois")
    file = tmp_path / "objects.json"
    file.write_text(json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 20, 20]}]}))
    with pytest.raises(StaleError, match="made from index"):
        run(encoder, tmp_path / "shards", Options(annotations=file), context)
