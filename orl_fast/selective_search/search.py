"""Boxes of one image in a deterministic order, from twelve hierarchies of regions of our kernels, or from OpenCV."""

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import DataError
from orl_fast.philox import uniforms
from orl_fast.selective_search.descriptors import describe_atoms
from orl_fast.selective_search.grouping import propose_regions
from orl_fast.selective_search.opencv import opencv_search
from orl_fast.selective_search.scratch import Array, Scratch
from orl_fast.selective_search.segmentation import segment

Backend = Literal["fast", "opencv"]

_RANK_STREAM = 32
_MAX_SIDE_PX = 2**15 - 1
_scratch = Scratch()


def selective_search(image_rgb: NDArray[np.uint8], *, seed: int, backend: Backend = "fast") -> NDArray[np.int16]:
    """Propose boxes that may hold objects (Uijlings et al., IJCV 2013, "fast" mode): every region of twelve hierarchical groupings.

    The order is random but reproducible, as in OpenCV: a box's rank is a random number in [0, 1) times its region's level in the
    hierarchy, ascending; a region of the segmentation has level 1, a merge is one above the higher of its parts. So small regions
    tend to come first. Of equal boxes the first stays. "fast" draws the numbers from (seed, proposal); "opencv" from the C library's
    global generator, so it runs one image at a time in a process, and nothing else may draw from that generator meanwhile.

    Both backends find the same set (docs/proposals.md says on which images, versions and processors that was measured).

    One thread per image, without the GIL for nearly all of the time; OpenCV's functions use OpenCV's own threads except within
    `one_opencv_thread`. docs/proposals.md says how much memory an image takes.

    Args:
        image_rgb: [H, W, 3] uint8 in any memory layout, H and W from 1 to 32,767; a gray image has three equal channels.
        seed: the image's own, non-negative; its lower 32 bits count.
        backend: "fast", or "opencv" for cv2.ximgproc's own.
    Returns:
        [P, 4] int16 xyxy, half-open, P >= 1, each box once, inside the image and not empty. A flat image gives the whole image.
    Raises:
        ValueError: image_rgb has another shape or type, or the backend is unknown. DataError: the image is too large for int16 boxes.
    """
    if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.size == 0:
        raise ValueError(f"image_rgb must be [H, W, 3] uint8 and not empty, not {list(image_rgb.shape)} {image_rgb.dtype}")
    height, width = image_rgb.shape[:2]
    if max(height, width) > _MAX_SIDE_PX:
        raise DataError(f"the image has {width} × {height} pixels, boxes hold at most {_MAX_SIDE_PX}; scale the image down")
    seed &= 0xFFFFFFFF
    image_rgb = np.ascontiguousarray(image_rgb)
    if backend == "opencv":
        return opencv_search(image_rgb, seed)
    if backend != "fast":
        raise ValueError(f"backend is {backend!r}; known are 'fast' and 'opencv'")
    boxes, levels = all_regions(image_rgb)
    rank = uniforms(seed, 0, 0, _RANK_STREAM, len(boxes)) * levels
    ordered = boxes[np.argsort(rank, kind="stable")].astype(np.int16)
    _, first = np.unique(ordered.view(np.int64), return_index=True)  # a box as one number
    return ordered[np.sort(first)]


def all_regions(image_rgb: Array) -> tuple[Array, Array]:
    """Every region of every hierarchy: two color spaces, three segmentations of each, two similarity strategies.

    Returns:
        boxes [P, 4] int32 xyxy, half-open, with duplicates; levels [P] int32: 1 for a region of a segmentation, a merge is one
        above the higher of its parts.
    """
    found = []
    for conversion in (cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2LAB):
        image = cv2.cvtColor(image_rgb, conversion)
        atom_of_pixel, regions = segment(image, _scratch)
        atoms = describe_atoms(image, atom_of_pixel, regions.shape[1], _scratch)
        found += [propose_regions(atoms, region_of_atom, atom_of_pixel.size) for region_of_atom in regions]
    boxes, levels = zip(*found, strict=True)
    return np.concatenate(boxes), np.concatenate(levels)
