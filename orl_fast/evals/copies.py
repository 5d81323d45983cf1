"""Images that are in the training part and in the test part, byte for byte, whatever their names."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orl_fast.shards import ShardIndex, ShardReader

_SLICE_BYTES = 64  # of a packed image, that are compared before all of it is
_BLOCK = 256
_Chosen = tuple[ShardIndex, NDArray[np.int64]]  # rows of packed images


def copied(train: Sequence[bytes], test: Sequence[bytes]) -> list[int]:
    """Positions in `train` of the digests of images that are in `test` too.

    What occurs again within one of them is not meant: photo sites' "not available" picture, or drawn images of one color.
    """
    counts = Counter(train), Counter(test)
    return [i for i, digest in enumerate(train) if counts[0][digest] == counts[1][digest] == 1]


def copied_files(train: Sequence[Path], test: Sequence[Path]) -> list[int]:
    """Positions in `train` of files that are in `test` too; only files of equal length are read."""
    sizes = [np.array([_num_bytes(path) for path in paths], np.int64) for paths in (train, test)]
    alike = [np.flatnonzero(np.isin(mine, others)).tolist() for mine, others in (sizes, sizes[::-1])]
    digests = [[_digest(paths[i]) for i in positions] for paths, positions in zip((train, test), alike, strict=True)]
    return [alike[0][i] for i in copied(*digests)]


def copied_rows(train: _Chosen, test: _Chosen) -> NDArray[np.int64]:
    """Rows of packed training images that are test images too; only images of equal length, height and width are read."""
    parts = train, test
    keys = [(index.sizes[rows] << 32) | (index.heights[rows].astype(np.int64) << 16) | index.widths[rows] for index, rows in parts]
    chosen = [rows[np.isin(mine, others)] for (_, rows), mine, others in zip(parts, keys, keys[::-1], strict=True)]
    middles = [
        [bytes(jpeg[len(jpeg) // 2 :][:_SLICE_BYTES]) for jpeg in _jpegs(index, rows)]
        for (index, _), rows in zip(parts, chosen, strict=True)
    ]  # fmt: skip
    in_both = set(middles[0]) & set(middles[1])
    likely = [rows[np.array([middle in in_both for middle in each], np.bool_)] for rows, each in zip(chosen, middles, strict=True)]
    digests = [[hashlib.sha256(jpeg.data).digest() for jpeg in _jpegs(index, rows)] for (index, _), rows in zip(parts, likely, strict=True)]
    return np.asarray(likely[0][np.array(copied(*digests), np.int64)])


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # what cannot be read is skipped and counted when it is to be encoded
        return -1


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return os.fsencode(path)


def _jpegs(index: ShardIndex, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    with closing(ShardReader(index)) as reader:
        for start in range(0, len(rows), _BLOCK):
            yield from reader.views(rows[start : start + _BLOCK])
