"""Tables: round trips, refusal of what is stale or damaged, and prefixes of pairs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.tables import BoxTable, NeighborTable, PairTable, TableInfo, num_pairs, open_info, table_info

INFO = TableInfo(kind="neighbors", made_from={"index": "3f2a"}, settings={"K": 2})


def _save(path: Path) -> NeighborTable:
    table = NeighborTable(neighbors=np.array([[1, 2], [0, 2], [0, 1]]), similarities=np.full((3, 2), 0.5, np.float32))
    table.save(path, INFO)
    return table


def test_a_table_comes_back_with_its_origin(tmp_path: Path) -> None:
    table = _save(tmp_path / "neighbors")
    again = NeighborTable.open(tmp_path / "neighbors")
    assert np.array_equal(again.neighbors, table.neighbors)
    assert np.array_equal(again.similarities, table.similarities)
    info = open_info(tmp_path / "neighbors", "neighbors", made_from={"index": "3f2a"}, remedy="orl-fast mine")
    assert info == INFO
    assert info.fingerprint == INFO.fingerprint


def test_fingerprints_tell_inputs_and_settings_apart() -> None:
    others = [
        TableInfo(kind="rois", made_from=INFO.made_from, settings=INFO.settings),
        TableInfo(kind="neighbors", made_from={"index": "91bc"}, settings=INFO.settings),
        TableInfo(kind="neighbors", made_from=INFO.made_from, settings={"K": 3}),
    ]
    assert len({INFO.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_wrong_tables_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="run orl-fast mine"):
        open_info(tmp_path / "neighbors", "neighbors", made_from={}, remedy="orl-fast mine")
    _save(tmp_path / "neighbors")
    with pytest.raises(StaleError, match=r"made from index 3f2a, this run uses 91bc; run orl-fast mine"):
        open_info(tmp_path / "neighbors", "neighbors", made_from={"index": "91bc"}, remedy="orl-fast mine")
    with pytest.raises(DataError, match="holds a neighbors table"):
        open_info(tmp_path / "neighbors", "rois", made_from={}, remedy="orl-fast mine")
    (tmp_path / "neighbors" / "table.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        table_info(tmp_path / "neighbors")
    (tmp_path / "neighbors" / "neighbors.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        NeighborTable.open(tmp_path / "neighbors")


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([0.05, 0.1, 0.2, 1.0]), st.sampled_from(["official", "paper"]))
def test_the_number_of_pairs_is_the_definition(query: int, partner: int, ratio: float, compat: str) -> None:
    base = query if compat == "official" else query * partner
    expected = min(max(1, int(ratio * base)), query * partner)
    assert num_pairs(query, partner, pair_ratio=ratio, compat=compat) == expected  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_fewer_neighbors_and_pairs_are_prefixes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_images, num_neighbors = 6, 3
    rois = BoxTable.from_lists([np.zeros((rng.integers(1, 40), 4), np.int16) for _ in range(num_images)])
    neighbors = np.stack([rng.permutation([j for j in range(num_images) if j != i])[:num_neighbors] for i in range(num_images)])
    count = num_pairs(rois.counts[:, None], rois.counts[neighbors], pair_ratio=0.2, compat="official").astype(np.int32)
    first = (np.cumsum(count) - count.ravel()).reshape(count.shape)
    rows = int(count.sum())
    roi = np.zeros(rows, np.int16)
    pairs = PairTable(
        neighbors=neighbors, first=first, count=count, query_roi=roi, partner_roi=roi, similarities=np.arange(rows, dtype=np.float32)
    )
    small = pairs.limited(rois, num_neighbors=2, pair_ratio=0.1)
    assert np.array_equal(small.neighbors, neighbors[:, :2])
    assert np.array_equal(small.first, first[:, :2])
    for i in range(num_images):
        for k in range(2):
            assert small.count[i, k] == min(max(1, int(0.1 * rois.counts[i])), rois.counts[i] * rois.counts[neighbors[i, k]])
    with pytest.raises(StaleError, match="--neighbors 4"):
        pairs.limited(rois, num_neighbors=4, pair_ratio=0.1)
