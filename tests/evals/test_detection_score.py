"""COCO's average precision, against pycocotools on drawn detections of every kind, and against cases computed by hand."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from orl_fast.evals.detection_masks import encode_mask
from orl_fast.evals.detection_score import STATISTICS, average_precision

WIDTH, HEIGHT, NUM_CATEGORIES = 160, 130, 3


def oracle(ground_truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """pycocotools called directly."""
    field = "bbox" if kind == "bbox" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        found = truth.loadRes([{name: each[name] for name in ("image_id", "category_id", "score", field)} for each in results])
        evaluated = COCOeval(truth, found, kind)
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return {name: value for name, value in zip(STATISTICS, evaluated.stats[:6].tolist(), strict=True) if value >= 0}


def _ellipse(box: Any) -> Any:
    x, y, width, height = box
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return encode_mask(((columns - x - width / 2) / (width / 2)) ** 2 + ((rows - y - height / 2) / (height / 2)) ** 2 <= 1)


def scene(seed: int, *, num_images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of all areas, some of them crowds; detections that hit, miss, repeat, tie in their scores, and exceed 100 in an image."""
    rng = np.random.default_rng(seed)

    def box(low: float = 6, high: float = 110) -> Any:
        size = rng.uniform(low, high, 2)
        corner = rng.uniform(0, np.maximum([WIDTH, HEIGHT] - size, 1))
        return np.round(np.concatenate([corner, size]), 1)

    images = [{"id": 7 * i + 3, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(num_images)]
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images[1:]:  # the first has no object
        for _ in range(rng.integers(0, 9)):
            own, crowd = box(), int(rng.random() < 0.15)
            category = int(rng.integers(1, NUM_CATEGORIES + 1)) * 10
            mask = _ellipse(own)
            area = float(own[2] * own[3] * 0.785)
            objects.append(
                {"id": len(objects) + 1, "image_id": image["id"], "category_id": category, "bbox": own.tolist(), "area": area}
                | {"iscrowd": crowd, "segmentation": mask}
            )
            for _ in range(rng.integers(0, 4)):
                moved = own + rng.normal(0, rng.choice([0, 2, 8]), 4)
                moved[2:] = np.maximum(moved[2:], 1)
                wrong = rng.random() < 0.1
                results.append({"image_id": image["id"], "category_id": 10 if wrong else category, "bbox": moved.tolist()})
    for image in images:
        for _ in range(rng.choice([0, 3, 130], p=[0.4, 0.5, 0.1])):
            results.append({"image_id": image["id"], "category_id": int(rng.integers(1, NUM_CATEGORIES + 1)) * 10, "bbox": box().tolist()})
    for each in results:
        each |= {"score": float(np.round(rng.random(), rng.choice([1, 8]))), "segmentation": _ellipse(each["bbox"])}
    categories = [{"id": 10 * (i + 1), "name": f"kind {i}"} for i in range(NUM_CATEGORIES)]
    return {"images": images, "annotations": objects, "categories": categories}, results


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_pycocotools(seed: int, kind: Any) -> None:
    ground_truth, results = scene(seed)
    found = average_precision(ground_truth, results, kind)
    assert found == pytest.approx(oracle(ground_truth, results, kind), abs=1e-12)
    assert 0 < found["ap"] < found["ap50"] < 1


def test_what_is_computed_by_hand() -> None:
    ground_truth, _ = scene(0)
    image = ground_truth["images"][0]["id"]
    square = {"id": 1, "image_id": image, "category_id": 10, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    other = square | {"id": 2, "bbox": [90, 80, 40, 40]}
    ground_truth["annotations"] = [square, other]
    # Of 101 recalls, 51 (0 to 0.50) are reached by the first detection, with precision 1; the shifted one has IoU 0.6.
    hit, shifted = {"bbox": [10, 10, 40, 40], "score": 0.9}, {"bbox": [100, 80, 40, 40], "score": 0.8}
    results = [{"image_id": image, "category_id": 10, **each} for each in (hit, shifted)]
    found = average_precision(ground_truth, results, "bbox")
    assert found["ap50"] == pytest.approx(1)
    assert found["ap75"] == pytest.approx(51 / 101)
    assert found["ap"] == pytest.approx((3 * 1 + 7 * 51 / 101) / 10)
    assert {"ap_small", "ap_large"}.isdisjoint(found)
    assert average_precision(ground_truth, [], "bbox") == {"ap": 0, "ap50": 0, "ap75": 0, "ap_medium": 0}
