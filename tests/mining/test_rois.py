"""RoIs of a table, and what mining in this process leaves behind."""

from pathlib import Path

import cv2
import numpy as np
from mining_world import World
from plain_boxes import random_boxes

from orl_fast.boxes import filter_proposals
from orl_fast.mining.executor import Processes
from orl_fast.mining.rois import filter_table, propose_shards
from orl_fast.tables import BoxTable


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
        list(propose_shards(tmp_path, [0], index=world.index, backend="fast", seed=0, executor=Processes()))
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
