"""Twelve hierarchies of regions: two color spaces, three segmentations of each, two similarity strategies."""

import cv2
import numpy as np

from orl_fast.selective_search.descriptors import describe_atoms
from orl_fast.selective_search.grouping import propose_regions
from orl_fast.selective_search.scratch import Array, Scratch
from orl_fast.selective_search.segmentation import segment

_scratch = Scratch()


def all_regions(image_rgb: Array) -> tuple[Array, Array]:
    """Every region of every hierarchy of an image [H, W, 3] uint8.

    Returns:
        boxes [P, 4] int32 xyxy, half-open, with duplicates; levels [P] int32: 1 for a region of a segmentation, a merge is one
        above the higher of its parts.
    """
    area = image_rgb.shape[0] * image_rgb.shape[1]
    found = []
    for conversion in (cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2LAB):
        image = cv2.cvtColor(image_rgb, conversion)
        segmentations = segment(image, _scratch)
        atoms = describe_atoms(image, segmentations.atoms, len(segmentations.regions[0]), _scratch)
        for regions, num_regions in zip(segmentations.regions, segmentations.num_regions, strict=True):
            found.append(propose_regions(atoms, regions, num_regions, area))
    boxes, levels = zip(*found, strict=True)
    return np.concatenate(boxes), np.concatenate(levels)
