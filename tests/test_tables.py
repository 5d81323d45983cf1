"""Tables: round trips, refusal of what is stale, damaged or does not fit, prefixes of pairs, and tables side by side."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.tables import (
    BoxTable,
    NeighborTable,
    PairTable,
    TableInfo,
    activate,
    find_table,
    new_table,
    num_pairs,
    open_info,
    table_info,
    tables_of,
)

INFO = TableInfo(kind="neighbors", made_from={"index": "3f2a"}, settings={"K": 2})
TABLE = NeighborTable(neighbors=np.array([[1, 2], [0, 2], [0, 1]]), similarities=np.full((3, 2), 0.5, np.float32))


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


def save(mined: Path, info: TableInfo) -> None:
    activate(mined / info.kind, info.fingerprint)
    if table_info(mined / info.kind) is None:
        with new_table(mined / info.kind, info) as folder:
            TABLE.write_arrays(folder)


def test_a_table_comes_back_with_its_origin(tmp_path: Path) -> None:
    save(tmp_path, INFO)
    info = open_info(tmp_path / "neighbors", "neighbors", made_from={"index": "3f2a"}, remedy="orl-fast mine")
    assert info == INFO
    assert info.fingerprint == INFO.fingerprint


def test_fingerprints_distinguish_inputs_and_settings() -> None:
    others = [
        TableInfo(kind="rois", made_from=INFO.made_from, settings=INFO.settings),
        TableInfo(kind="neighbors", made_from={"index": "91bc"}, settings=INFO.settings),
        TableInfo(kind="neighbors", made_from=INFO.made_from, settings={"K": 3}),
    ]
    assert len({INFO.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_wrong_tables_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="run orl-fast mine"):
        open_info(tmp_path / "neighbors", "neighbors", made_from={}, remedy="orl-fast mine")
    save(tmp_path, INFO)
    with pytest.raises(StaleError, match=r"made from index 3f2a, this run uses 91bc; run orl-fast mine"):
        open_info(tmp_path / "neighbors", "neighbors", made_from={"index": "91bc"}, remedy="orl-fast mine")
    with pytest.raises(DataError, match="holds a neighbors table"):
        open_info(tmp_path / "neighbors", "rois", made_from={}, remedy="orl-fast mine")
    (tmp_path / "neighbors" / "table.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        table_info(tmp_path / "neighbors")


@settings(max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_every_table_that_was_made_is_found(tmp_path_factory: pytest.TempPathFactory, choices: list[int]) -> None:
    """In whatever order settings change; each is made once, and the one asked for last is current."""
    mined = tmp_path_factory.mktemp("mined")
    infos = {k: TableInfo(kind="pairs", made_from={}, settings={"K": k}) for k in choices}
    for k in choices:
        save(mined, infos[k])
        assert table_info(mined / "pairs") == infos[k]
        assert next(tables_of(mined, "pairs")) == infos[k]
    for k, info in infos.items():
        path = find_table(mined, "pairs", info.fingerprint)
        assert path == mined / ("pairs" if k == choices[-1] else f"pairs@{info.fingerprint}")
    assert len(list(mined.iterdir())) == len(infos) == len(list(tables_of(mined, "pairs")))
    assert find_table(mined, "rois", infos[choices[0]].fingerprint) is None


def test_two_folders_of_one_table_are_refused_and_both_stay(tmp_path: Path) -> None:
    save(tmp_path, INFO)
    (tmp_path / "neighbors").rename(tmp_path / f"neighbors@{INFO.fingerprint}")
    with new_table(tmp_path / "neighbors", INFO) as folder:
        TABLE.write_arrays(folder)
    with pytest.raises(DataError, match=r"holds the same table as .*neighbors; remove one of them"):
        activate(tmp_path / "neighbors", "other")
    assert len(list(tmp_path.glob("neighbors*/table.json"))) == 2
