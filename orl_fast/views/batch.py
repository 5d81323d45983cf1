"""What a renderer gives and a loss takes: the views of a batch by name."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rendered views, without the samples of which an image could not be decoded."""

    views: dict[str, Tensor]  # by the name of its ViewSpec, [B, 3, S, S] uint8 channels_last
    rows: Rows  # [B] the images rendered
    bad_rows: Rows  # the images left out because they, or their neighbor, could not be decoded
    bad_sources: Rows  # what could not be decoded: rows, and numbers of patches (see `Crops.source`)
