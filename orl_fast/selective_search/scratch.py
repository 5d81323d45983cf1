"""Buffers that are reused for the next image: fresh memory costs page faults, an eighth of selective search's time."""

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

Array = np.ndarray[Any, Any]
_KEEP_BYTES = 2**24  # per buffer; those of large images are made and freed as usual


class Scratch(threading.local):
    """Uninitialized arrays by name, each thread its own. An array is valid until its name is taken again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array of a shape, over the name's buffer."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if num_bytes > _KEEP_BYTES:
            return np.empty(shape, dtype)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._buffers[name] = np.empty(num_bytes, np.uint8)
        return buffer[:num_bytes].view(dtype).reshape(shape)
