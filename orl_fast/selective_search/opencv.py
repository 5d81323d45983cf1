"""OpenCV's own selective search, and its threads."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_c_library_lock = threading.Lock()


@contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Keep OpenCV from starting threads of its own, where images are the parallel unit. The setting is the whole process's."""
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(num_threads)


def opencv_search(image_rgb: NDArray[np.uint8], seed: int) -> NDArray[np.int16]:
    """`selective_search` by cv2.ximgproc; one image at a time in a process."""
    search: Any = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
    search.switchToSelectiveSearchFast()
    with _c_library_lock:  # OpenCV ranks with rand(), whose state is the process's
        ctypes.CDLL(None).srand(ctypes.c_uint(seed))
        boxes_xywh = search.process()
    boxes = np.asarray(boxes_xywh, np.int16)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
