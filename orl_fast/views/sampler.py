"""Which image comes at which step: a pure function of (seed, epoch, position), so that a step number is the whole state."""

from dataclasses import dataclass

import numba as nb
import numpy as np
from numpy.typing import NDArray

from orl_fast.errors import ConfigError
from orl_fast.philox import philox4x32

_STREAM = 0  # see orl_fast.views.chance for the others
_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Every image exactly once per epoch, in an order that the seed and the epoch decide.

    The s-th batch of an epoch holds its positions s * batch_size … (s + 1) * batch_size - 1, however ranks and accumulation share it:
    micro-batch m of rank r takes the (m * world_size + r)-th part. ConfigError: they cannot share it evenly, or there are fewer images.
    """

    num_images: int
    batch_size: int  # images per step, over all ranks and micro-batches
    world_size: int = 1
    accumulate: int = 1
    seed: int

    def __post_init__(self) -> None:
        if min(self.num_images, self.batch_size, self.world_size, self.accumulate) < 1:
            raise ConfigError(f"sampler: {self}; num_images, batch_size, world_size and accumulate must be 1 or more")
        parts = self.world_size * self.accumulate
        if self.batch_size % parts:
            how = f"{self.world_size} ranks × {self.accumulate} micro-batches"
            raise ConfigError(f"train.batch_size = {self.batch_size}: not a multiple of {how}; use a multiple of {parts}")
        if self.num_images < self.batch_size:
            raise ConfigError(
                f"batch size {self.batch_size}: the data holds only {self.num_images} images, so an epoch would have no step; "
                f"set train.batch_size to at most {self.num_images}"
            )

    @property
    def micro_batch(self) -> int:
        """Images per rank and forward pass."""
        return self.batch_size // (self.world_size * self.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; what is left of an epoch is left out."""
        return self.num_images // self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def rows(self, step: int, *, rank: int = 0, micro: int = 0) -> NDArray[np.int64]:
        """[micro_batch] int64: the images of one micro-batch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch_size + (micro * self.world_size + rank) * self.micro_batch
        return _permuted(start, start + self.micro_batch, self.num_images, self.seed, epoch)  # type: ignore[no-any-return]


@nb.njit(cache=True, nogil=True)
def _permuted(start, stop, num_images, seed, epoch):  # type: ignore[no-untyped-def]
    """Entries start … stop - 1 of a permutation of 0 … num_images - 1, without storing it.

    A Feistel network permutes 0 … 4**bits - 1 >= num_images; values outside go through again (cycle walking).
    """
    bits = 1
    while 4**bits < num_images:
        bits += 1
    mask = np.uint64((1 << bits) - 1)
    out = np.empty(stop - start, np.int64)
    for i in range(stop - start):
        value = np.uint64(start + i)
        while True:
            left, right = value >> np.uint64(bits), value & mask
            for r in range(_ROUNDS):
                word = philox4x32(right, np.uint64(_STREAM), np.uint64(r), np.uint64(0), np.uint64(seed), np.uint64(epoch))[0]
                left, right = right, left ^ (word & mask)
            value = (left << np.uint64(bits)) | right
            if value < np.uint64(num_images):
                break
        out[i] = np.int64(value)
    return out
