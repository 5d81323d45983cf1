"""Provenance: fingerprints, refusal of what is stale or damaged, and tables side by side."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.provenance import TableInfo, activate, find_table, new_table, open_info, table_info, tables_of
from orl_fast.tables import NeighborTable

INFO = TableInfo(kind="neighbors", made_from={"index": "3f2a"}, settings={"K": 2})
TABLE = NeighborTable(neighbors=np.array([[1, 2], [0, 2], [0, 1]]), similarities=np.full((3, 2), 0.5, np.float32))


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
