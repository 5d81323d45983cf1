from pathlib import Path

import pytest
from PIL import Image

from orl_fast.demo.run import Demo, DemoSize, learned_beat_random
from orl_fast.errors import StaleError

_TINY = DemoSize(num_scenes=32, num_labelled=8, byol_epochs=1, orl_epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


def test_all_stages_and_a_second_run_that_does_nothing_again(folder: Path) -> None:
    demo = Demo(folder=folder, size=_TINY)
    results = demo.run()
    assert list(results) == ["random", "BYOL", "ORL"]
    assert all(0 <= values[kind] <= 1 for values in results.values() for kind in ("probe", "knn", "chance"))
    with Image.open(folder / "pairs.png") as picture:
        assert picture.format == "PNG"
    made = {file: file.stat().st_mtime_ns for file in (*folder.rglob("*.pt"), folder / "results.json")}
    assert len(made) == 3
    assert Demo(folder=folder, size=_TINY).run() == results
    assert made == {file: file.stat().st_mtime_ns for file in made}


def test_another_seed_needs_a_restart_which_leaves_other_files_alone(folder: Path) -> None:
    demo = Demo(folder=folder, seed=1, size=_TINY)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StaleError, match="use --restart"):
        demo.run()
    demo.clear()
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_both_must_beat_random_features_by_the_margin() -> None:
    def check(random: float, byol: float, orl: float) -> list[str]:
        return learned_beat_random({name: {"probe": value} for name, value in (("random", random), ("BYOL", byol), ("ORL", orl))})

    assert check(0.5, 0.6, 0.55) == []
    assert check(0.5, 0.6, 0.51) == ["ORL"]
    assert check(0.5, 0.4, 0.5) == ["BYOL", "ORL"]
