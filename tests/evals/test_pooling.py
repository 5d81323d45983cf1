"""Pooled feature levels against the numbers of the protocol."""

import pytest
import torch
from torch.nn import functional as F

from orl_fast.evals.pooling import pool_levels


def test_a_resnet50_at_224_px_has_the_protocols_sizes() -> None:
    shapes = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
    levels = [torch.rand(2, channels, side, side) for channels, side in shapes]
    pooled = pool_levels(levels)
    assert [features.shape[1] for features in pooled] == [9216, 9216, 8192, 9216, 8192]
    padded = F.pad(levels[0], (4, 4, 4, 4))  # zeros count as values, as in the reference
    torch.testing.assert_close(pooled[0].view(2, 64, 12, 12)[:, :, 0, 0], padded[:, :, :10, :10].mean((2, 3)))
    torch.testing.assert_close(pooled[3].view(2, 1024, 3, 3)[:, :, 2, 1], levels[3][:, :, 6:14, 3:11].mean((2, 3)))


@pytest.mark.parametrize(
    ("channels", "size", "expected"), [(512, (7, 7), 4 * 4), (64, (3, 5), 3 * 5), (384, (14, 14), 4 * 4), (20000, (2, 2), 1)]
)
def test_other_maps_are_pooled_to_at_most_9216_numbers(channels: int, size: tuple[int, int], expected: int) -> None:
    (pooled,) = pool_levels([torch.rand(1, channels, *size)])
    assert pooled.shape[1] == channels * expected
