"""Encoding in general: full batches, bounded plans, float32."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orl_fast import encode
from orl_fast.encode import MAX_DECODED_BYTES, _float32, _full_batches, bounded

MB = 1 << 20


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 600 * MB)), min_size=1, max_size=40), st.integers(1, 64), st.integers(0, 1000))
def test_ranges_hold_bounded_crops_and_bytes(images: list[tuple[int, int]], max_crops: int, start: int) -> None:
    num_crops, num_bytes = np.array(images, np.int64).T
    rows = range(start, start + len(images))
    ranges = list(bounded(rows, num_crops=num_crops, num_bytes=num_bytes, max_crops=max_crops))
    assert [row for part in ranges for row in part] == list(rows)
    for part in ranges:
        own = slice(part.start - start, part.stop - start)
        assert len(part) == 1 or (num_crops[own].sum() <= max_crops and num_bytes[own].sum() <= MAX_DECODED_BYTES)
    for first, second in pairwise(ranges):  # none could take one image more
        own = slice(first.start - start, second.start - start + 1)
        assert num_crops[own].sum() > max_crops or num_bytes[own].sum() > MAX_DECODED_BYTES


def test_photographs_of_24_megapixels_are_decoded_a_few_at_a_time() -> None:
    num_bytes = np.full(256, 6000 * 4000 * 3)
    ranges = list(bounded(range(256), num_crops=np.ones(256, np.int64), num_bytes=num_bytes, max_crops=256))
    assert {len(part) for part in ranges} <= {3, 1}


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_batches_are_full_but_for_the_last(size: int) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 12, 20).tolist()
    values = torch.arange(sum(sizes))
    batches = list(_full_batches(torch.split(values, sizes), size))
    assert torch.equal(torch.cat(batches), values)
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert 1 <= len(batches[-1]) <= size


def test_tf32_is_off_while_encoding_and_on_again_after() -> None:
    convolutions, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    former = convolutions.fp32_precision, matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(KeyError), _float32():
            assert (convolutions.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
            raise KeyError
        assert (convolutions.fp32_precision, matmul.fp32_precision) == (former[0], "tf32")
    finally:
        matmul.fp32_precision = former[1]
    assert torch.backends.cudnn.allow_tf32  # the older switch can still be read


def test_what_fails_while_rendering_ahead_is_raised() -> None:
    def items():  # type: ignore[no-untyped-def]
        yield 1
        raise OSError("gone")

    ahead = encode._ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
