"""Philox against the known answers of its authors, and the draws made of it."""

import numba as nb
import numpy as np
import pytest

from orl_fast.philox import philox4x32, uniform, uniforms


@nb.njit
def _words(counter: np.ndarray, key: np.ndarray) -> tuple[int, int, int, int]:
    return philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


# Random123's known-answer vectors for philox4x32, 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert [int(word) for word in _words(np.array(counter, np.uint64), np.array(key, np.uint64))] == expected


def test_draws_are_uniform_and_depend_on_every_argument() -> None:
    draws = uniforms(1, 2, 3, 4, 100_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=50, range=(0, 1))[0]
    assert np.sum((counts - 2000) ** 2 / 2000) < 95  # chi-squared, 49 degrees of freedom, p about 1e-4
    base = (1, 2, 3, 4, 5)
    changed = [tuple(v + (i == j) for j, v in enumerate(base)) for i in range(5)]
    assert len({uniform(*arguments) for arguments in [base, *changed]}) == 6
    assert uniform(1, 2, 3, 4, 7) == draws[7]
    assert uniform(1, 2, 3 + 2**32, 4, 7) != draws[7]
