"""Default locations."""

from pathlib import Path

import pytest

from orl_fast.checkpoint import write_checkpoint
from orl_fast.errors import DataError
from orl_fast.places import default_shards, mined_folder, run_folder, stage_1_checkpoint
from tests.test_checkpoint import HEADER


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _pack(*names: str) -> None:
    for name in names:
        (Path("shards") / name).mkdir(parents=True)
        (Path("shards") / name / "manifest.json").touch()


def _run(method: str, mined: dict[str, str]) -> Path:
    path = Path("runs/coco") / method / "checkpoint.pt"
    write_checkpoint(path, {**HEADER, "method": method, "mined": mined}, model={}, optimizer={})
    return path


def test_the_only_data_set_need_not_be_named() -> None:
    with pytest.raises(DataError, match="no packed images here; run orl-fast shard FOLDER"):
        default_shards()
    _pack("coco")
    assert default_shards() == default_shards(Path("coco")) == default_shards(Path("shards/coco")) == Path("shards/coco")
    assert default_shards(Path("elsewhere")) == Path("elsewhere")  # opening it reports that nothing is there
    _pack("voc")
    with pytest.raises(DataError, match=r"several data sets \(coco, voc\); name the one to use"):
        default_shards()
    assert default_shards(Path("voc")) == Path("shards/voc")


def test_tables_lie_in_the_shards_and_runs_beside_them() -> None:
    assert mined_folder(Path("shards/coco")) == Path("shards/coco/mined")
    assert run_folder(Path("shards/coco"), "orl") == run_folder(Path("shards/coco/../coco"), "orl") == Path("runs/coco/orl")


def test_stage_1_is_byol_or_the_only_run_without_pairs() -> None:
    shards, byol = Path("shards/coco"), Path("runs/coco/byol/checkpoint.pt")
    assert stage_1_checkpoint(shards) == byol
    _run("orl", {"pairs": "p"})
    assert stage_1_checkpoint(shards) == byol
    other = _run("multicrop", {})
    assert stage_1_checkpoint(shards) == other
    _run("simclr", {})
    with pytest.raises(DataError, match=r"several runs can be mined with; choose with --checkpoint runs/coco/multicrop/checkpoint.pt"):
        stage_1_checkpoint(shards)
    _run("byol", {})
    assert stage_1_checkpoint(shards) == byol
