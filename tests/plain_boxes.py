"""Boxes to test with, and their overlap in Python numbers."""

import numpy as np


def plain_iou(a, b):
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union else 0.0


def random_boxes(rng, num, *, side=640, empty=0.1, repeated=0.2):
    """Boxes of all sizes, some without area, some twice, some a nudge away from another."""
    corners = rng.integers(0, side, (num, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    flat = rng.random(num) < empty
    boxes[flat, 2] = boxes[flat, 0]
    again = np.flatnonzero(rng.random(num) < repeated)
    boxes[again] = boxes[rng.integers(0, num, len(again))]
    nudged = np.flatnonzero(rng.random(num) < repeated)
    boxes[nudged] += rng.integers(0, 3, (len(nudged), 1)) * np.array([0, 0, 1, 1])
    return boxes.astype(np.int16)
