"""COCO's average precision of boxes and masks, by hotcoco, which equals pycocotools (`tests/evals/test_detection_score.py`)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import hotcoco

STATISTICS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl"}  # hotcoco's names


def average_precision(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Literal["bbox", "segm"]
) -> dict[str, float]:
    """COCO's AP over IoU 0.50 to 0.95, at 0.50, at 0.75, and by area, of at most 100 detections per image; 0 to 1.

    Args:
        ground_truth: the content of an annotation file. Crowds take up detections and are no objects to be found.
        results: "image_id", "category_id", "score", and "bbox" [x, y, width, height] or "segmentation" (run lengths).
    Returns:
        `STATISTICS`, without those of an area range that has no object.
    """
    # With both, the evaluator takes a detection's area from its box; for masks it is that of the mask, as on COCO's server.
    field = "bbox" if kind == "bbox" else "segmentation"
    found = [{name: each[name] for name in ("image_id", "category_id", "score", field)} for each in results]
    truth = hotcoco.COCO(dict(ground_truth))
    evaluated = hotcoco.COCOeval(truth, truth.load_res(found), kind)
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summary_lines()  # fills what the next line gets
    values = evaluated.get_results()
    return {name: float(values[key]) for name, key in STATISTICS.items() if values[key] >= 0}
