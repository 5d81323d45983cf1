"""Which run a command is about: the method, and the configuration and tables that it is started or resumed with."""

import shutil
from pathlib import Path

import pytest

from orl_fast.config import Config
from orl_fast.errors import ConfigError, MissingStageError, StaleError
from orl_fast.methods import METHODS
from orl_fast.places import mined_folder, run_folder
from orl_fast.recipe import config_to_toml, load_config
from orl_fast.shards import ShardIndex
from orl_fast.train.run import Run, choose_run, needs_pairs, next_method
from tests.train.conftest import run_config, train_run, write_tables


@pytest.fixture
def data(packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardIndex:
    """A place of its own: shards/twelve, and no runs yet."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed.path, tmp_path / "shards" / "twelve")
    return ShardIndex.open(Path("shards/twelve"))


def _mine(data: ShardIndex, *, num_neighbors: int = 3) -> None:
    write_tables(mined_folder(data.path), index=data.fingerprint, heights=data.heights, widths=data.widths, num_neighbors=num_neighbors)


def _choose(data: ShardIndex, **options: object) -> tuple[Run, list[str]]:
    logged: list[str] = []
    run = choose_run(data, announce=lambda message, *values: logged.append(message % values), **options)  # type: ignore[arg-type]
    return run, logged


def _train(data: ShardIndex, method: str, config: Config, *, max_steps: int = 1) -> None:
    mined = mined_folder(data.path) if needs_pairs(method, config) else None
    train_run(data, run_folder(data.path, method), config, method=method, mined=mined, max_steps=max_steps)


def test_the_first_stage_is_byol_with_the_methods_recipe(data: ShardIndex) -> None:
    run, logged = _choose(data)
    assert run == Run(method="byol", config=load_config(METHODS["byol"].recipe), folder=Path("runs/twelve/byol"), mined=None)
    assert logged == ["stage 1, BYOL: nothing is mined yet in shards/twelve/mined", "recipe: coco-r50"]
    run, logged = _choose(data, recipe="tiny", overrides=["epochs=7"], folder=Path("elsewhere"))
    assert (run.config, run.folder) == (load_config("tiny", overrides=["epochs=7"]), Path("elsewhere"))
    assert logged[-1] == "recipe: tiny, with epochs=7"


def test_once_pairs_are_mined_comes_orl_with_stage_1s_recipe_and_the_pairs_numbers(data: ShardIndex) -> None:
    _train(data, "byol", run_config("intra_weight=0.25", "mining.num_neighbors=9"))
    _mine(data)
    run, logged = _choose(data)
    assert (run.method, run.folder) == ("orl", Path("runs/twelve/orl"))
    assert run.config == run_config("intra_weight=0.25", "mining.num_neighbors=3")
    assert run.mined is not None
    assert logged[0] == "stage 3, ORL: pairs are there in shards/twelve/mined"
    assert logged[1] == "recipe: runs/twelve/byol/recipe.toml, with mining.num_neighbors=3, mining.pair_ratio=0.1"
    assert _choose(data, method="byol")[0].method == "byol"


def test_what_is_named_goes_before_what_is_found(data: ShardIndex) -> None:
    _train(data, "byol", run_config())
    _mine(data)
    run, logged = _choose(data, recipe="tiny", overrides=["mining.num_neighbors=2"])
    assert run.config == load_config("tiny", overrides=["mining.num_neighbors=2"])
    assert run.mined is not None
    assert run.mined.pairs.neighbors.shape == (12, 2)
    assert logged[-1] == "recipe: tiny, with mining.num_neighbors=2"
    with pytest.raises(StaleError, match=r"5 neighbors .* need more pairs than were mined"):
        _choose(data, recipe="tiny")  # asks for 5


def test_a_run_is_resumed_with_its_own_recipe(data: ShardIndex) -> None:
    """The review's 4.12: bare, ORL took the pairs' numbers instead of the run's."""
    _mine(data)
    config = run_config("mining.num_neighbors=1", "lr_per_256=0.7")
    _train(data, "orl", config)
    run, logged = _choose(data)
    assert run.config == config
    assert logged[-1] == "configuration: of the run in runs/twelve/orl"
    train_run(data, run.folder, run.config, mined=mined_folder(data.path), max_steps=2)
    assert _choose(data, overrides=["log_every_steps=1"])[0].config == run_config(
        "mining.num_neighbors=1", "lr_per_256=0.7", "log_every_steps=1"
    )
    assert _choose(data, restart=True)[0].config.mining.num_neighbors == 3  # a new run


def test_a_run_is_resumed_with_its_own_tables(data: ShardIndex) -> None:
    _mine(data)
    _train(data, "orl", run_config())
    before = _choose(data)[0].mined
    assert before is not None
    pairs = mined_folder(data.path) / "pairs"
    pairs.rename(pairs.with_name(f"pairs@{before.fingerprints['pairs']}"))
    _mine(data, num_neighbors=5)
    again, new = _choose(data)[0].mined, _choose(data, restart=True)[0].mined
    assert again is not None
    assert new is not None
    assert again.fingerprints == before.fingerprints != new.fingerprints


def test_orl_without_pairs_and_unknown_methods_are_explained(data: ShardIndex) -> None:
    with pytest.raises(MissingStageError, match="no pairs table; run orl-fast mine shards/twelve"):
        _choose(data, method="orl")
    with pytest.raises(ConfigError, match=f"--method simclrr: use one of {', '.join(METHODS)}"):
        _choose(data, method="simclrr")
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        _choose(data, recipe="tinyy")


def test_orl_of_images_alone_starts_without_pairs(data: ShardIndex) -> None:
    (data.path.parent.parent / "image.toml").write_text(config_to_toml(run_config("intra_weight=0", "inter_weight=0")))
    run, _ = _choose(data, method="orl", recipe="image.toml")
    assert run.mined is None
    assert not needs_pairs("orl", run.config)
    assert needs_pairs("orl", run_config("intra_weight=0"))
    assert not needs_pairs("byol", run_config())


def test_the_next_stage_follows_from_what_is_mined(data: ShardIndex, tmp_path: Path) -> None:
    mined = mined_folder(data.path)
    assert next_method(data, mined)[0] == "byol"
    _mine(data)
    assert next_method(data, mined)[0] == "orl"
    write_tables(tmp_path / "other", index="other shards", heights=data.heights, widths=data.widths)
    with pytest.raises(StaleError, match="made from index other shards"):
        next_method(data, tmp_path / "other")
