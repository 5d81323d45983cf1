"""Selective search (Uijlings et al., IJCV 2013, "fast" mode): class-agnostic object proposals of one image.

    from orl_fast.selective_search import selective_search

    boxes = selective_search(image_rgb, seed=0)  # [P, 4] int16 xyxy

It finds the boxes that OpenCV finds at a fraction of its time. It needs NumPy, numba and OpenCV, and nothing of ORL.
"""

from orl_fast.selective_search.opencv import one_opencv_thread
from orl_fast.selective_search.search import Backend, selective_search

__all__ = ["Backend", "one_opencv_thread", "selective_search"]
