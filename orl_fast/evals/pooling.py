"""Feature maps of several depths, each pooled to about 9,000 numbers: what linear classifiers of the paper's Tables 1 and 2 see."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

MAX_FEATURES = 9216
# Kernel, stride and padding for the maps of a ResNet-50's conv1, layer1 … layer4 at 224 px, by channels and side.
_RESNET50 = {
    (64, 112): (10, 10, 4),
    (256, 56): (16, 8, 0),
    (512, 28): (13, 5, 0),
    (1024, 14): (8, 3, 0),
    (2048, 7): (6, 1, 0),
}


def pool_levels(levels: Sequence[Tensor]) -> list[Tensor]:
    """Average-pool maps [B, C, h, w] → [B, at most 9216], flattened channel by channel.

    The maps of a ResNet-50 at 224 px get the poolings of the protocol (9216, 9216, 8192, 9216 and 8192 numbers); any other map is divided
    into the most squares of equal size that stay within 9216 numbers.
    """
    return [_pool(level).flatten(1) for level in levels]


def _pool(level: Tensor) -> Tensor:
    channels, height, width = level.shape[1:]
    fixed = _RESNET50.get((channels, height)) if height == width else None
    if fixed is not None:
        kernel, stride, padding = fixed
        return F.avg_pool2d(level, kernel, stride, padding)
    side = max(1, int((MAX_FEATURES / channels) ** 0.5))
    return F.adaptive_avg_pool2d(level, (min(side, height), min(side, width)))
