"""Counter-based random numbers: a draw is a pure function of its purpose.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). There is no state, so the
views of any image in any epoch can be drawn in any order, by any thread or rank, and a resumed run needs only its step.
"""

import numba as nb
import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_MUL_0, _MUL_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32 = np.uint64(32)
_UNIT = 2.0**-53


@nb.njit(cache=True, nogil=True, inline="always")
def philox4x32(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds on a 4-word counter and a 2-word key; words are uint64 holding 32 bits. Returns four words."""
    for _ in range(10):
        p0, p1 = c0 * _MUL_0, c2 * _MUL_1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


@nb.njit(cache=True, nogil=True)
def uniform(seed, epoch, image, stream, index):  # type: ignore[no-untyped-def]
    """One float64 in [0, 1): draw number `index` of a stream (the purpose) of an image in an epoch.

    All arguments are non-negative integers; seed, epoch, stream and index below 2**32, image below 2**63.
    """
    row = np.uint64(image)
    w0, w1, _, _ = philox4x32(
        np.uint64(index), np.uint64(stream), row & _MASK, row >> _32, np.uint64(seed) & _MASK, np.uint64(epoch) & _MASK
    )
    return np.float64(((w0 << _32) | w1) >> np.uint64(11)) * _UNIT


@nb.njit(cache=True, nogil=True)
def uniforms(seed, epoch, image, stream, count):  # type: ignore[no-untyped-def]
    """[count] float64: the first draws of one stream (see `uniform`)."""
    out = np.empty(count, np.float64)
    for i in range(count):
        out[i] = uniform(seed, epoch, image, stream, i)
    return out
