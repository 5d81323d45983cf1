"""Data for detection: odd annotations are skipped and named, or refused; images, boxes and masks stay together; batches are exact."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.detection_data import (
    DetectionData,
    Example,
    batches_of_steps,
    load_example,
    open_detection_data,
    resized_px,
    training_examples,
)
from orl_fast.evals.detection_masks import draw_mask, encode_mask, read_mask
from tests.evals.scenes import CATEGORIES, draw_split, write_split

CPU = Context(device=torch.device("cpu"))
SIZE_PX = (80, 48)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("coco")
    return root, draw_split(root, "val2017", seeds=range(6), size_px=SIZE_PX)


@pytest.fixture
def opened(drawn: tuple[Path, dict[str, Any]]) -> Callable[..., DetectionData]:
    """Opens the drawn data after a change of its annotations."""
    root, content = drawn

    def _open(change: Callable[[Any], Any] = lambda content: None, **options: Any) -> DetectionData:
        changed = copy.deepcopy(content)
        change(changed)
        return open_detection_data(write_split(root, "val2017", changed), root / "val2017", **{"masks": True, "context": CPU, **options})

    return _open


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    return caplog


def test_a_sound_file_is_scored_against_itself(opened: Any, drawn: Any) -> None:
    root, content = drawn
    data = opened()
    found = data.as_coco()
    assert found == {"images": content["images"], "annotations": content["annotations"], "categories": CATEGORIES}
    assert (data.num_skipped_images, data.num_skipped_objects, data.plain.all()) == (0, 0, True)
    assert [path.parent for path in data.paths] == [root / "val2017"] * 6


def _first(content: Any, **values: Any) -> None:
    content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: _first(c, bbox=[]), "without a box"),
        (lambda c: _first(c, bbox=[3, 4, 0, 9]), "without a box"),
        (lambda c: _first(c, bbox=[3, 4, float("nan"), 9]), "without a box"),
        (lambda c: c["annotations"][0].pop("bbox"), "without a box"),
        (lambda c: _first(c, bbox=[0.1, 0.2, 0.5, 0.6]), "shares of the image's sides"),
        (lambda c: _first(c, bbox=[200, 10, 20, 20]), "1 objects outside of their images: id 1"),
        (lambda c: _first(c, category_id=99), "1 objects of categories that are not listed, or share their id with others: id 1"),
        (lambda c: _first(c, image_id=999), "an image that is not listed"),
        (lambda c: _first(c, segmentation=[[1, 2, 3, 4]]), "1 objects without a mask that can be used: of image 000000.jpg"),
        (lambda c: c["annotations"][0].pop("segmentation"), "without a mask"),
        (lambda c: _first(c, segmentation={"size": [1, 2], "counts": [2]}), "without a mask"),
        (lambda c: _first(c, bbox=[60, 4, 10, 9], segmentation=[[0, 0, 0.5, 0, 0.5, 0.5]]), "without a mask"),
    ],
)
def test_an_odd_object_is_skipped_counted_and_named(opened: Any, change: Any, named: str, messages: pytest.LogCaptureFixture) -> None:
    data = opened(change)
    assert len(data.images) == 11
    assert data.num_skipped_objects == 1
    assert data.num_skipped_images == 0
    assert named in messages.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["images"][0].update(width=64), "1 images of another size than annotated: 000000.jpg"),
        (lambda c: c["images"][0].update(file_name="absent.jpg"), "1 images that are not there: absent.jpg"),
    ],
)
def test_an_odd_image_is_skipped_with_its_objects(opened: Any, change: Any, named: str, messages: pytest.LogCaptureFixture) -> None:
    data = opened(change)
    assert (len(data.paths), len(data.images)) == (5, 10)
    assert (data.num_skipped_images, data.num_skipped_objects) == (1, 2)
    assert named in messages.text


def _boxes(content: Any, change: Callable[[list[float]], list[float]]) -> None:
    for each in content["annotations"]:
        each["bbox"] = change(each["bbox"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: _boxes(c, lambda box: [box[0] / 80, box[1] / 48, box[2] / 80, box[3] / 48]),
            "multiply x and width by the image's width",
        ),
        (lambda c: _boxes(c, lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]), r"12 of 12 boxes are \[left, top, right"),
        (lambda c: _boxes(c, lambda box: [8 * value for value in box]), "reach out of their images"),
        (lambda c: _boxes(c, lambda box: [box[0] + 900, *box[1:]]), "12 of 12 boxes reach out of their images"),
        (lambda c: [image.update(file_name="x" + image["file_name"]) for image in c["images"]], "6 images that are not there"),
        (lambda c: [image.update(width=640, height=480) for image in c["images"]], "6 images of another size than annotated"),
        (lambda c: [each.update(category_id=5) for each in c["annotations"]], "none of its 12 objects can be used"),
        (lambda c: [each.pop("segmentation") for each in c["annotations"][:7]], "7 of 12 objects have no mask"),
        (lambda c: c["annotations"].clear(), "has no annotated objects; give another file"),
        (
            lambda c: [image.update(file_name=f"val2017/{image['file_name']}") for image in c["images"]],
            r"6 images that are not there.*; val2017/000000\.jpg is in .*coco\d*, so name that one",
        ),
        (lambda c: c.pop("images"), "no list 'images'"),
    ],
)
def test_files_that_are_wrong_as_a_whole_are_refused(opened: Any, change: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        opened(change)


def test_corners_in_place_of_sizes_are_refused_without_masks_too(opened: Any) -> None:
    with pytest.raises(DataError, match=r"of 12 boxes reach out of their images"):
        opened(lambda c: _boxes(c, lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]), masks=False)


def test_a_few_odd_objects_do_not_cost_a_small_file(opened: Any, messages: pytest.LogCaptureFixture) -> None:
    data = opened(lambda c: [each.update(segmentation=[]) for each in c["annotations"][:3]])
    assert (len(data.images), data.num_skipped_objects) == (9, 3)
    assert "3 objects without a mask that can be used: of image 000000.jpg" in messages.text
    assert len(opened(lambda c: [each.update(bbox=[70, 5, 60, 9]) for each in c["annotations"][:3]], masks=False).images) == 12


def test_ids_of_any_kind_are_joined_and_become_positions_in_results(opened: Any) -> None:
    def named(content: Any) -> None:
        for image in content["images"]:
            image["id"] = f"2007_{image['id']:06d}"
        for each in content["annotations"]:
            each["image_id"] = f"2007_{each['image_id']:06d}"
            each["category_id"] = str(each["category_id"])

    data = opened(named)
    assert data.image_ids.tolist() == list(range(6))
    assert data.category_ids == (3, 7)
    assert data.boxes.tolist() == opened().boxes.tolist()
    assert opened(lambda c: c["categories"].append({"id": "n01440764", "name": "tench"})).category_ids == (1, 2, 3)


def test_what_is_listed_twice_by_name_is_merged(opened: Any, messages: pytest.LogCaptureFixture) -> None:
    def twice(content: Any) -> None:
        content["images"].append(content["images"][0] | {"id": 500})
        content["annotations"][0]["image_id"] = 500
        content["categories"].append({"id": 9, "name": "disk"})
        content["annotations"][1]["category_id"] = 9

    data = opened(twice)
    assert (len(data.paths), data.categories, data.category_ids) == (6, ("box", "disk"), (3, 7))
    assert len(data.members(0)) == 2
    assert data.image_ids[0] == 10
    assert "categories listed again by the same name" in messages.text


def test_crowds_are_kept_for_testing_and_dropped_for_training(opened: Any) -> None:
    def crowds(content: Any) -> None:
        mask = encode_mask(np.ones(SIZE_PX[::-1], np.uint8))
        _first(content, iscrowd=1, segmentation=mask, bbox=[0, 0, 80, 48])
        content["annotations"][2]["iscrowd"] = content["annotations"][3]["iscrowd"] = 1  # all of the second image

    data = opened(crowds)
    assert data.crowds.sum() == 3
    train = data.for_training()
    assert (len(train.paths), len(train.images), train.crowds.any()) == (5, 9, False)
    assert data.paths[1] not in train.paths
    assert train.images.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert train.masks is not None
    assert len(train.masks) == 9


def test_objects_without_visible_width_are_tested_and_not_trained_on(opened: Any, messages: pytest.LogCaptureFixture) -> None:
    data = opened(lambda c: _first(c, bbox=[79.999, 4, 30, 9], segmentation=[[79, 4, 80, 4, 80, 13]]))
    train = data.for_training()
    assert (len(data.images), len(train.images), train.num_skipped_objects) == (12, 11, 1)
    assert "1 objects are less than 0.01 px wide or high" in messages.text


def test_areas_that_are_missing_are_those_of_the_masks(opened: Any) -> None:
    for area in (None, -1, float("nan"), 2**70, [5]):
        data = opened(lambda c, area=area: [each.update(area=area) for each in c["annotations"]])
        assert data.areas == pytest.approx(opened().areas, rel=0.2)
    alone = opened(lambda c: [each.update(area="large") for each in c["annotations"]], masks=False)
    assert alone.areas == pytest.approx((alone.boxes[:, 2] - alone.boxes[:, 0]) * (alone.boxes[:, 3] - alone.boxes[:, 1]))


def test_without_masks_all_objects_are_kept(opened: Any, messages: pytest.LogCaptureFixture) -> None:
    data = opened(lambda c: [each.pop("segmentation") for each in c["annotations"]])
    assert (len(data.images), data.masks, data.num_skipped_objects) == (12, None, 0)
    assert "no object has a mask" in messages.text
    assert opened(lambda c: _first(c, segmentation=None), masks=False).num_skipped_objects == 0


def _shows_its_objects(example: Example) -> None:
    """Objects are red or blue, all else is gray: the mask covers the color, and fits the box."""
    assert example.masks is not None
    colorful = (example.image.float().amax(0) - example.image.float().amin(0)) > 90
    assert (colorful == example.masks.any(0)).float().mean() > 0.93
    for box, label, mask in zip(example.boxes.tolist(), example.labels.tolist(), example.masks, strict=True):
        rows, columns = np.nonzero(mask.numpy())
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx(box, abs=1.6)
        red, _, blue = (example.image.float() * mask).sum((1, 2)).tolist()
        assert (red > blue) == (label == 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short_px", [48, 96])
def test_image_boxes_and_masks_are_resized_and_flipped_together(opened: Any, short_px: int, flip: bool) -> None:
    for form in ("polygons", "run lengths"):
        data = opened(_as_run_lengths if form == "run lengths" else lambda content: None)
        for image in range(len(data.paths)):
            example = load_example(data, image, short_px=short_px, max_px=1000, flip=flip)
            assert isinstance(example, Example)
            assert example.image.shape == (3, short_px, short_px * 80 // 48)
            _shows_its_objects(example)


def test_images_that_are_no_plain_jpegs_are_decoded_as_they_are_packed(opened: Any, drawn: Any) -> None:
    root, _ = drawn
    with Image.open(root / "val2017" / "000000.jpg") as image:
        image.convert("RGBA").save(root / "val2017" / "alpha.png")
        image.convert("CMYK").save(root / "val2017" / "cmyk.jpg", quality=95)

    def renamed(content: Any) -> None:
        content["images"][0]["file_name"] = "alpha.png"
        content["images"].append(content["images"][0] | {"id": 900, "file_name": "cmyk.jpg"})
        content["annotations"] += [each | {"image_id": 900} for each in content["annotations"][:2]]

    data = opened(renamed)
    assert data.plain.tolist() == [False, *[True] * 5, False]
    for image in (0, 6):
        example = load_example(data, image, short_px=48, max_px=1000)
        assert isinstance(example, Example)
        _shows_its_objects(example)


def _as_run_lengths(content: Any) -> None:
    for each in content["annotations"]:
        mask = read_mask(each["segmentation"], size_px=SIZE_PX)
        assert mask is not None
        each["segmentation"] = encode_mask(draw_mask(mask, size_px=SIZE_PX))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_objects_annotated_as_stored_are_rotated_with_their_image(
    tmp_path: Path, orientation: int, messages: pytest.LogCaptureFixture
) -> None:
    content = draw_split(tmp_path, "val2017", seeds=range(3), size_px=SIZE_PX)
    for path in (tmp_path / "val2017").iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = orientation
            image.save(path, quality=95, exif=exif)
    if orientation == 6:
        content["annotations"][0]["segmentation"] = encode_mask(
            draw_mask(read_mask(content["annotations"][0]["segmentation"], size_px=SIZE_PX) or (), size_px=SIZE_PX)
        )
    data = open_detection_data(write_split(tmp_path, "val2017", content), tmp_path / "val2017", masks=True, context=CPU)
    assert "3 images are stored rotated (EXIF)" in messages.text
    assert data.sizes_px[0].tolist() == list(SIZE_PX[::-1] if orientation >= 5 else SIZE_PX)
    for image in range(3):
        example = load_example(data, image, short_px=96, max_px=1000)
        assert isinstance(example, Example)
        _shows_its_objects(example)


@pytest.mark.parametrize(
    ("size_px", "expected"),
    [
        ((640, 480), (1067, 800)),
        ((480, 640), (800, 1067)),
        ((640, 200), (1333, 417)),
        ((500, 375), (1067, 800)),
        ((2000, 2000), (800, 800)),
    ],
)
def test_sizes_are_detectron2s(size_px: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_px(size_px, short_px=800, max_px=1333) == expected


def _with_sizes(opened: Any, sizes: list[tuple[int, int]]) -> DetectionData:
    data = opened()
    number = len(sizes)
    return data.__class__(**{**vars(data), "paths": tuple(Path(f"{i}.jpg") for i in range(number)), "sizes_px": np.array(sizes)})


def test_batches_hold_every_image_once_an_epoch_and_one_orientation_per_rank(opened: Any) -> None:
    data = _with_sizes(opened, [(80, 48) if i % 3 else (48, 80) for i in range(30)])
    batches = batches_of_steps(data, num_steps=60, batch_size=4, world_size=2, seed=1)
    assert batches.shape == (60, 2, 2)
    lying = data.sizes_px[batches][..., 0] > data.sizes_px[batches][..., 1]
    assert (lying == lying[..., :1]).all()
    counts = np.bincount(batches.ravel(), minlength=30)
    assert counts.min() >= 7
    assert counts.max() <= 9
    assert np.array_equal(batches_of_steps(data, num_steps=20, batch_size=4, world_size=2, seed=1), batches[:20])
    assert not np.array_equal(batches_of_steps(data, num_steps=60, batch_size=4, world_size=2, seed=2), batches)


def test_global_batches_of_one_orientation_do_not_depend_on_the_number_of_ranks(opened: Any) -> None:
    data = _with_sizes(opened, [(80, 48)] * 10)
    alone, four = (batches_of_steps(data, num_steps=9, batch_size=8, world_size=ranks, seed=0) for ranks in (1, 4))
    assert np.array_equal(alone.reshape(9, 8), four.reshape(9, 8))
    one = _with_sizes(opened, [(80, 48)])
    assert not batches_of_steps(one, num_steps=3, batch_size=4, world_size=1, seed=0).any()


def test_examples_are_functions_of_their_step(opened: Any) -> None:
    data = opened().for_training()
    batches = batches_of_steps(data, num_steps=5, batch_size=4, world_size=1, seed=0)
    settings: dict[str, Any] = {"sizes_px": (48, 64, 80), "max_px": 200, "seed": 3, "context": Context(device=CPU.device, num_threads=3)}
    straight = list(training_examples(data, batches, first_step=0, **settings))
    resumed = list(training_examples(data, batches, first_step=3, **settings))
    assert [len(batch) for batch in straight] == [4] * 5
    for before, after in zip(straight[3:], resumed, strict=True):
        assert all(torch.equal(one.image, other.image) for one, other in zip(before, after, strict=True))
    sides = {example.image.shape[1] for batch in straight for example in batch}
    assert sides == {48, 64, 80}
    examples = [example for batch in straight for example in batch]
    flipped = 0
    for image, example in zip(batches.flat, examples, strict=True):
        plain = load_example(data, int(image), short_px=example.image.shape[1], max_px=200)
        assert isinstance(plain, Example)
        flipped += not torch.equal(plain.image, example.image)
        assert torch.equal(plain.labels, example.labels)
    assert 4 <= flipped <= 16


def test_an_image_that_cannot_be_decoded_is_left_out_and_named_once(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    draw_split(tmp_path, "train2017", seeds=range(2))
    damaged = tmp_path / "train2017" / "000001.jpg"
    damaged.write_bytes(damaged.read_bytes()[:900])  # of which the header is whole
    data = open_detection_data(tmp_path / "annotations" / "instances_train2017.json", damaged.parent, masks=True, context=CPU)
    assert len(data.paths) == 2
    settings: dict[str, Any] = {"first_step": 0, "sizes_px": (64,), "max_px": 200, "seed": 0, "context": CPU}
    batches = np.array([[[0, 1]], [[1, 0]], [[0, 0]]])
    assert [len(batch) for batch in training_examples(data, batches, **settings)] == [1, 1, 2]
    assert messages.text.count("000001.jpg: left out of the training, cannot be decoded") == 1
    with pytest.raises(DataError, match="no image of step 0 can be decoded"):
        next(training_examples(data, batches[:, :, 1:], **settings))
