"""Fine-tuning a detector: schedule, what it learns, exact resume, ranks, and what is refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from orl_fast.cli.main import cli
from orl_fast.config import Config, ModelConfig
from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.evals import Context, detect
from orl_fast.evals.detect import Options, learning_rate, open_data, parse_sizes, run, summary
from orl_fast.evals.detection_inference import found_objects
from orl_fast.evals.detection_model import Detections
from orl_fast.models import Encoder, random_encoder
from tests.evals.scenes import draw_split, write_split
from tests.evals.test_detection_score import oracle
from tests.ranks import run_ranks

CPU = Context(device=torch.device("cpu"))
SMALL: dict[str, Any] = {"train_sizes": "64", "test_size": 64, "width": 16, "rois_per_image": 32}


def small_encoder() -> Encoder:
    return random_encoder(Config(model=ModelConfig(backbone="resnet10_small")))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    draw_split(root, "train2017", seeds=range(16))
    draw_split(root, "val2017", seeds=range(100, 108))
    return root


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    return caplog


def test_the_schedule_is_detectron2s() -> None:
    def lr(step: int, **changed: Any) -> float:
        return learning_rate(step, **{"peak": 0.02, "num_steps": 90_000, "num_warmup": 1000, **changed})

    def detectron2(step: int) -> float:
        """WarmupMultiStepLR of Detectron2, with the values of its 1x configurations."""
        alpha = step / 1000
        factor = 0.001 * (1 - alpha) + alpha if step < 1000 else 1
        return 0.02 * factor * 0.1 ** sum(step >= milestone for milestone in (60_000, 80_000))

    steps = [0, 1, 500, 999, 1000, 59_999, 60_000, 79_999, 80_000, 89_999]
    assert [lr(step) for step in steps] == pytest.approx([detectron2(step) for step in steps], rel=1e-12)
    assert [lr(step, num_steps=180, num_warmup=0) for step in (0, 119, 120, 159, 160)] == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])


def test_sizes_are_a_range_or_a_list() -> None:
    assert parse_sizes("640-800") == (640, 672, 704, 736, 768, 800)
    assert parse_sizes("160") == (160,)
    assert parse_sizes("160, 192") == (160, 192)
    for text in ("", "a", "800-640", "1-2-3"):
        with pytest.raises(ValueError, match="write a range"):
            parse_sizes(text)
    with pytest.raises(ValidationError, match="at least 64"):
        Options(train_sizes="32-64")


def test_a_mask_is_drawn_where_its_pixels_centers_lie() -> None:
    """Against a loop over pixels that interpolates the mask bilinearly, zero outside, as Detectron2's paste_masks_in_image."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((6, 28, 28))).float()
    corner = rng.uniform(0, 20, (6, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(2, 18, (6, 2))], axis=1)).float()
    found = Detections(boxes=boxes, labels=torch.tensor([1, 2, 1, 2, 1, 3]), scores=torch.linspace(0.9, 0.4, 6), masks=masks)
    objects = found_objects(found, image_id=5, category_ids=[10, 20, None], from_px=(40, 40), to_px=(80, 60))
    assert [entry["category_id"] for entry in objects] == [10, 20, 10, 20, 10]  # the third label has no category
    for entry, mask, box in zip(objects, masks.numpy(), boxes.numpy(), strict=False):
        x, y, right, bottom = box * [2, 1.5, 2, 1.5]
        assert entry["bbox"] == pytest.approx([x, y, right - x, bottom - y], rel=1e-5)
        expected = np.zeros((60, 80))
        for row in range(60):
            for column in range(80):
                i, j = (row + 0.5 - y) / (bottom - y) * 28 - 0.5, (column + 0.5 - x) / (right - x) * 28 - 0.5
                for r, c in ((int(np.floor(i)) + a, int(np.floor(j)) + b) for a in (0, 1) for b in (0, 1)):
                    if 0 <= r < 28 and 0 <= c < 28:
                        expected[row, column] += mask[r, c] * (1 - abs(i - r)) * (1 - abs(j - c))
        drawn = detect_mask(entry["segmentation"])
        certain = abs(expected - 0.5) > 1e-4
        # Half of a mask's outermost pixels lies outside of the box, where Detectron2 on a CPU draws nothing either.
        within = np.zeros_like(certain)
        within[int(y) : int(np.ceil(bottom)), int(x) : int(np.ceil(right))] = True
        assert np.array_equal(drawn[certain & within], (expected >= 0.5)[certain & within])
        assert not drawn[~within].any()


def detect_mask(segmentation: Any) -> Any:
    from hotcoco import mask

    return mask.decode(segmentation)


def test_it_learns_and_its_results_score_the_same_in_pycocotools(scenes: Path, tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    options = Options(schedule=60, batch_size=2, lr=0.03, **SMALL)
    values = run(small_encoder(), scenes, options, replace(CPU, work=tmp_path))
    assert values["box_ap50"] > 0.5
    assert values["mask_ap50"] > 0.5
    ground_truth, results = (json.loads((tmp_path / name).read_text()) for name in ("ground-truth.json", "results.json"))
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = oracle(ground_truth, results, kind)
        assert {key: values[f"{name}_{key}"] for key in expected} == pytest.approx(expected, abs=1e-12)
    counts = {"iterations": 60, "num_train_images": 16, "num_train_objects": 32, "num_test_images": 8, "num_test_objects": 16}
    assert counts.items() <= values.items()
    assert "trained on 16 images with 32 objects (0 images and 0 objects skipped), tested on 8 images" in summary(values)
    assert "60 iterations of 2 images (7.5 epochs), lr 0.03, warm-up over 12, × 0.1 at 40 and 53" in messages.text


def _tiny(**changed: Any) -> Options:
    return Options(**{"schedule": 6, "batch_size": 2, "train_sizes": "64,96", "test_size": 64, "width": 8, "rois_per_image": 8, **changed})


def _interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    def interrupting(step: int, **settings: Any) -> float:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, **settings)

    monkeypatch.setattr(detect, "learning_rate", interrupting)


def _weights(work: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(work / "checkpoint.pt")["parts"]["model"])


def test_an_interrupted_training_ends_as_a_straight_one(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, resumed = replace(CPU, work=tmp_path / "straight"), replace(CPU, work=tmp_path / "resumed", num_threads=3)
    expected = run(small_encoder(), scenes, _tiny(), straight)
    _interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(small_encoder(), scenes, _tiny(), resumed)
    assert torch.load(tmp_path / "resumed" / "checkpoint.pt")["step"] == 4
    monkeypatch.setattr(detect, "learning_rate", learning_rate)
    assert run(small_encoder(), scenes, _tiny(), resumed) == expected
    before, after = _weights(tmp_path / "straight"), _weights(tmp_path / "resumed")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _interrupt(monkeypatch, 0)  # nothing is trained again where the test alone is left
    (tmp_path / "resumed" / "results.json").unlink()
    assert run(small_encoder(), scenes, _tiny(), resumed) == expected
    assert (tmp_path / "resumed" / "results.json").read_bytes() == (tmp_path / "straight" / "results.json").read_bytes()


def test_what_was_begun_with_other_annotations_is_not_resumed(scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        (root / name).symlink_to(scenes / name)
        (root / "annotations" / f"instances_{name}.json").write_bytes((scenes / "annotations" / f"instances_{name}.json").read_bytes())
    context = replace(CPU, work=tmp_path / "work")
    run(small_encoder(), root, _tiny(schedule=1), context)
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    content["annotations"].pop()
    write_split(root, "train2017", content)
    with pytest.raises(StaleError, match="begun with other annotations"):
        run(small_encoder(), root, _tiny(schedule=1), context)


_RANK = """
import sys
from dataclasses import replace
from pathlib import Path
from orl_fast.distributed import process_group
from tests.evals.test_detect import CPU, _tiny, run, small_encoder
with process_group("cpu") as ranks:
    values = run(small_encoder(), Path(sys.argv[1]), _tiny(**TINY), replace(CPU, ranks=ranks, work=Path(sys.argv[2])))
    print("AP", values["box_ap"], int(values["num_detections"]))
"""
_ONE_SIZE = {"schedule": 1, "batch_size": 4, "train_sizes": "64", "rois_per_image": 64, "lr": 0.02, "warmup": 0}


def test_two_ranks_train_and_test_as_one(scenes: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(_RANK.replace("TINY", repr(_ONE_SIZE)))
    alone = run(small_encoder(), scenes, _tiny(**_ONE_SIZE), replace(CPU, work=tmp_path / "alone"))
    outputs = run_ranks(*[[script, scenes, tmp_path / "two"]] * 2)
    assert [exit_code for exit_code, _ in outputs] == [0, 0], outputs
    reported = {output.strip().splitlines()[-1] for _, output in outputs}
    assert len(reported) == 1
    one, two = _weights(tmp_path / "alone"), _weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:  # as many RoIs of either kind in each image, so that the ranks' means weigh alike
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    images = [entry["image_id"] for entry in json.loads((tmp_path / "two" / "results.json").read_text())]
    assert images == sorted(images)
    assert alone["num_test_images"] == 8


def _copied(scenes: Path, root: Path, change: Callable[[Any, Any], Any]) -> Path:
    """The scenes with changed annotations of both parts."""
    contents = []
    for name in ("train2017", "val2017"):
        root.mkdir(exist_ok=True)
        (root / name).symlink_to(scenes / name)
        contents.append(json.loads((scenes / "annotations" / f"instances_{name}.json").read_text()))
    change(*contents)
    for name, content in zip(("train2017", "val2017"), contents, strict=True):
        write_split(root, name, content)
    return root


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda train, val: val["categories"].__setitem__(1, {"id": 7, "name": "sphere"}), "lacks: sphere"),
        (lambda train, val: [each.update(iscrowd=1) for each in train["annotations"]], "nothing to train on"),
        (lambda train, val: [each.update(iscrowd=1) for each in val["annotations"]], "nothing to find"),
        (lambda train, val: train["images"].append(val["images"][0] | {"file_name": "../val2017/000100.jpg"}), None),
    ],
)
def test_parts_that_do_not_fit_are_refused(scenes: Path, tmp_path: Path, change: Any, reason: str | None) -> None:
    root = _copied(scenes, tmp_path / "coco", change)
    if reason is None:  # the image has no object to train on
        train, _ = open_data(root, Options(), CPU)
        assert len(train.paths) == 16
        content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
        content["annotations"].append(content["annotations"][0] | {"image_id": content["images"][-1]["id"]})
        write_split(root, "train2017", content)
        reason = "1 images are in the training data and in the test data"
    with pytest.raises(DataError, match=reason):
        open_data(root, Options(), CPU)


def test_categories_are_matched_by_name(scenes: Path, tmp_path: Path) -> None:
    def other_ids(train: Any, val: Any) -> None:
        for each in [*val["categories"], *val["annotations"]]:
            field = "id" if "name" in each else "category_id"
            each[field] = {3: 7, 7: 3}[each[field]]

    values = run(small_encoder(), _copied(scenes, tmp_path / "coco", other_ids), _tiny(), replace(CPU, work=tmp_path / "swapped"))
    assert values == run(small_encoder(), scenes, _tiny(), replace(CPU, work=tmp_path / "same"))


def test_one_file_for_both_parts_is_told(scenes: Path, messages: pytest.LogCaptureFixture) -> None:
    file = scenes / "annotations" / "instances_val2017.json"
    train, val = open_data(scenes, Options(train_annotations=file, val_annotations=file), CPU)
    assert train.paths == val.paths
    assert "training and testing on the same images" in messages.text


def test_which_files_are_meant_has_to_be_clear(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found none; name it with --train-annotations"):
        open_data(tmp_path, Options(), CPU)
    annotations = scenes / "annotations"
    with pytest.raises(DataError, match="no such file"):
        open_data(scenes, Options(val_annotations=tmp_path / "absent.json"), CPU)
    with pytest.raises(DataError, match="no such folder; name that of the images of instances_val2017"):
        open_data(scenes, Options(val_images=tmp_path / "absent"), CPU)
    elsewhere = Options(
        train_annotations=annotations / "instances_train2017.json", train_images=scenes / "train2017",
        val_annotations=annotations / "instances_val2017.json", val_images=scenes / "val2017",
    )  # fmt: skip
    assert [len(part.paths) for part in open_data(tmp_path, elsewhere, CPU)] == [16, 8]


def test_without_masks_boxes_alone_are_detected(scenes: Path, tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    def maskless(train: Any, val: Any) -> None:
        for each in val["annotations"]:
            del each["segmentation"]

    root = _copied(scenes, tmp_path / "coco", maskless)
    values = run(small_encoder(), root, _tiny(schedule=1), replace(CPU, work=tmp_path / "work"))
    assert "boxes alone are detected" in messages.text
    assert "Faster R-CNN on resnet10_small" in messages.text
    assert not [name for name in values if name.startswith("mask")]
    assert "AP of small / medium / large objects: box" in summary(values)
    chosen = run(small_encoder(), scenes, _tiny(schedule=1, masks=False), CPU)
    assert not [name for name in chosen if name.startswith("mask")]


def test_a_loss_that_is_not_finite_stops_with_a_remedy(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the loss is not finite .* use a lower --lr than 1e\+30, or a longer --warmup than 0"):
        run(small_encoder(), scenes, _tiny(lr=1e30, warmup=0), replace(CPU, work=tmp_path))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_too_little_memory_is_explained(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(detect.Detector, "forward", full)
    with pytest.raises(ConfigError, match="iteration 0: 2 images a step do not fit into the GPU's memory; use more GPUs"):
        run(small_encoder(), scenes, _tiny(), CPU)


def test_test_images_that_cannot_be_decoded_are_left_out(scenes: Path, tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    root = _copied(scenes, tmp_path / "coco", lambda train, val: None)
    (root / "val2017").unlink()
    shutil.copytree(scenes / "val2017", root / "val2017")
    damaged = root / "val2017" / "000103.jpg"
    damaged.write_bytes(damaged.read_bytes()[:900])
    values = run(small_encoder(), root, _tiny(schedule=1), replace(CPU, work=tmp_path / "work"))
    assert (values["num_test_images"], values["num_test_objects"], values["num_skipped_test_images"]) == (7, 14, 1)
    assert "000103.jpg: left out of the test, cannot be decoded" in messages.text
    ground_truth = json.loads((tmp_path / "work" / "ground-truth.json").read_text())
    assert 113 not in [image["id"] for image in ground_truth["images"]]


def test_the_command_shows_what_was_found(scenes: Path, tmp_path: Path) -> None:
    arguments = ["eval", "detect", "random", str(scenes), "--backbone", "resnet10_small", "--device", "cpu", "--out", str(tmp_path)]
    options = ["--schedule", "1", "--batch-size", "2", "--train-sizes", "64", "--test-size", "64", "--width", "8", "--rois-per-image", "8"]
    result = CliRunner().invoke(cli, [*arguments, *options, "--no-masks", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "–" in result.output  # no mask AP
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert record["values"]["num_train_objects"] == 32
    assert record["options"]["train_sizes"] == "64"
    assert (next((tmp_path / "evals").iterdir()) / "results.json").exists()


def test_bfloat16_trains_and_detects(scenes: Path) -> None:
    values = run(small_encoder(), scenes, _tiny(schedule=2, precision="bf16"), CPU)
    assert 0 <= values["box_ap"] <= 1


def test_what_cannot_be_run_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    other = random_encoder(Config(model=ModelConfig(backbone="squeezenet1_1")))
    with pytest.raises(ConfigError, match="squeezenet1_1: detection takes ResNets"):
        run(other, tmp_path, Options(), CPU)
    with pytest.raises(ConfigError, match="--batch-size 3: cannot be divided among 2 ranks"):
        run(small_encoder(), tmp_path, Options(batch_size=3), replace(CPU, ranks=replace(CPU.ranks, world_size=2)))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_and_detects_as_the_cpu_does(scenes: Path, precision: str) -> None:
    cuda = torch.device("cuda")
    options = _tiny(schedule=2, precision=precision, train_sizes="64")
    found = run(small_encoder().to(cuda), scenes, options, Context(device=cuda, num_threads=2))
    expected = run(small_encoder(), scenes, options, CPU)
    counts = [name for name in expected if name.startswith("num_") and name != "num_detections"]
    assert {name: found[name] for name in counts} == {name: expected[name] for name in counts}
    assert 0 <= found["box_ap"] <= 1
    assert 0 < found["num_detections"] <= 800
