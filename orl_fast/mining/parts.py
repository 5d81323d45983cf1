"""The files of single shards, NAME-000000.npy …, and how they are written and joined: what a killed run has finished stays."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orl_fast.files import atomic_file
from orl_fast.tables import open_array


def pieces(images: range, size: int) -> Iterator[range]:
    """Cut into ranges of `size`; the last may be shorter."""
    return (images[start : start + size] for start in range(0, len(images), size))


def part_path(path: Path, name: str, shard: int) -> Path:
    """The file of one array of one shard."""
    return path / f"{name}-{shard:06d}.npy"


def open_part(path: Path, name: str, shard: int) -> NDArray[Any]:
    """Memory-map one array of one shard."""
    return open_array(path, part_path(path, name, shard).stem)


@contextmanager
def array_writer(path: Path) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Write an .npy file atomically, block by block, at least one; all have the type of the first, and its shape but for the rows."""
    header: dict[str, Any] = {}
    with atomic_file(path) as file:

        def write(block: NDArray[Any]) -> None:
            if not header:
                header.update(descr=np.lib.format.dtype_to_descr(block.dtype), fortran_order=False, shape=(0, *block.shape[1:]))
                np.lib.format.write_array_header_1_0(file, header)
            header["shape"] = (header["shape"][0] + len(block), *block.shape[1:])
            file.write(np.ascontiguousarray(block).data)

        yield write
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)  # as long as before: numpy leaves room for any number of rows


def join_arrays(path: Path, blocks: Iterable[NDArray[Any]]) -> None:
    """Write blocks, one after another, as one .npy file."""
    with array_writer(path) as write:
        for block in blocks:
            write(block)
