"""Tables: round trips, refusal of what does not fit or is damaged, and prefixes of pairs."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.errors import DataError, StaleError
from orl_fast.tables import BoxTable, NeighborTable, PairTable, num_pairs


def test_arrays_come_back_and_are_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{int(file)}")), fsync(file))[1])
    table = NeighborTable(neighbors=np.array([[1, 2], [0, 2], [0, 1]]), similarities=np.full((3, 2), 0.5, np.float32))
    table.write_arrays(tmp_path)
    again = NeighborTable.open(tmp_path)
    assert np.array_equal(again.neighbors, table.neighbors)
    assert np.array_equal(again.similarities, table.similarities)
    assert sum(Path(path).is_relative_to(tmp_path) and path != str(tmp_path) for path in synced) == 2
    (tmp_path / "neighbors.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        NeighborTable.open(tmp_path)


def test_boxes_that_do_not_fit_are_refused() -> None:
    table = BoxTable.from_lists([np.array([[0, 0, 32767, 9]]), np.empty((0, 4), np.int64), np.array([[-32768, 1, 2, 3]])])
    assert table.boxes.tolist() == [[0, 0, 32767, 9], [-32768, 1, 2, 3]]
    assert (table.boxes.dtype, table.counts.tolist()) == (np.int16, [1, 0, 1])
    with pytest.raises(ValueError, match=r"boxes reach from 0 to 40000; int16 holds -32768 to 32767"):
        BoxTable.from_lists([np.array([[0, 0, 40000, 9]])])


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([0.05, 0.1, 0.2, 1.0]), st.sampled_from(["official", "paper"]))
def test_the_number_of_pairs_is_the_definition(query: int, partner: int, ratio: float, compat: str) -> None:
    base = query if compat == "official" else query * partner
    expected = min(max(1, int(ratio * base)), query * partner)
    assert num_pairs(query, partner, pair_ratio=ratio, variant=compat) == expected  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_fewer_neighbors_and_pairs_are_prefixes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_images, num_neighbors = 6, 3
    rois = BoxTable.from_lists([np.zeros((rng.integers(1, 40), 4), np.int16) for _ in range(num_images)])
    neighbors = np.stack([rng.permutation([j for j in range(num_images) if j != i])[:num_neighbors] for i in range(num_images)])
    count = num_pairs(rois.counts[:, None], rois.counts[neighbors], pair_ratio=0.2, variant="official").astype(np.int32)
    first = (np.cumsum(count) - count.ravel()).reshape(count.shape)
    rows = int(count.sum())
    roi = np.zeros(rows, np.int16)
    pairs = PairTable(
        neighbors=neighbors, first=first, count=count, query_roi=roi, partner_roi=roi, similarities=np.arange(rows, dtype=np.float32)
    )
    small = pairs.limited(rois, num_neighbors=2, pair_ratio=0.1, variant="official")
    assert np.array_equal(small.neighbors, neighbors[:, :2])
    assert np.array_equal(small.first, first[:, :2])
    for i in range(num_images):
        for k in range(2):
            assert small.count[i, k] == min(max(1, int(0.1 * rois.counts[i])), rois.counts[i] * rois.counts[neighbors[i, k]])
    with pytest.raises(StaleError, match="--neighbors 4"):
        pairs.limited(rois, num_neighbors=4, pair_ratio=0.1, variant="official")


def test_pairs_that_were_not_mined_are_not_given() -> None:
    """A share of all entries cannot be taken from a table of the image's share; the other way round it can."""
    rois = BoxTable.from_lists([np.zeros((10, 4), np.int16)] * 2)
    neighbors = np.array([[1], [0]])
    tables = {}
    for compat in ("official", "paper"):
        count = num_pairs(rois.counts[:, None], rois.counts[neighbors], pair_ratio=0.2, variant=compat).astype(np.int32)
        roi, first = np.zeros(count.sum(), np.int16), (np.cumsum(count) - count.ravel()).reshape(count.shape)
        tables[compat] = PairTable(
            neighbors=neighbors, first=first, count=count, query_roi=roi, partner_roi=roi, similarities=np.zeros(len(roi), np.float32)
        )
    assert tables["paper"].limited(rois, num_neighbors=1, pair_ratio=0.2, variant="official").count.tolist() == [[2], [2]]
    with pytest.raises(StaleError, match=r"pair ratio 0.2 \(paper\) need more pairs than were mined, 1 neighbors with 2 pairs each"):
        tables["official"].limited(rois, num_neighbors=1, pair_ratio=0.2, variant="paper")
    with pytest.raises(StaleError, match=r"pair ratio 0.3 \(official\) need more pairs"):
        tables["official"].limited(rois, num_neighbors=1, pair_ratio=0.3, variant="official")
