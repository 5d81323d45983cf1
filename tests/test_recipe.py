"""Recipes and overrides, and messages that name the nearest key."""

import tomllib
from importlib import resources
from pathlib import Path

import pytest

from orl_fast.errors import ConfigError
from orl_fast.recipe import config_from_dict, config_to_dict, config_to_toml, load_config, recipe_names, with_overrides


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "copy.toml").write_text(config_to_toml(config))
    assert load_config(tmp_path / "copy.toml") == config
    assert config_from_dict(config_to_dict(config), where="copy") == config


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_holds_nothing_but_differences_from_the_defaults(name: str) -> None:
    text = (resources.files("orl_fast") / "recipes" / f"{name}.toml").read_text()
    assert text.startswith("# ")
    assert "  orl-fast " in text  # its command
    default, found = config_to_dict(load_config()), config_to_dict(load_config(name))
    for section, values in tomllib.loads(text).items():
        assert all(found[section][key] != default[section][key] for key in values), section


def test_overrides_take_dotted_and_unique_bare_keys() -> None:
    config = load_config(overrides=["train.epochs=2", "lr_per_256=0.5", "crop_area=0.2,1", "variant=paper", "compile=true"])
    assert (config.train.epochs, config.optim.lr_per_256, config.views.crop_area) == (2, 0.5, (0.2, 1.0))
    assert (config.variant, config.train.compile) == ("paper", True)
    assert (
        load_config(overrides=["crop_area=(0.2, 1)"]).views == load_config(overrides=["views.crop_area=[0.2, 1.0]"]).views == config.views
    )
    assert load_config(overrides=["epochs=3", "epochs=2"]).train.epochs == 2


def test_overrides_keep_what_they_do_not_name() -> None:
    tiny = load_config("tiny")
    changed = with_overrides(tiny, ["train.epochs=7"])
    assert changed.train.epochs == 7
    assert with_overrides(changed, [f"epochs={tiny.train.epochs}"]) == tiny


def test_the_earlier_name_of_a_key_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text('compat = "paper"\n')
    assert load_config(tmp_path / "old.toml").variant == load_config(overrides=["compat=paper"]).variant == "paper"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", "did you mean 'train.epochs'"),
        ("epohcs=2", "did you mean 'train.epochs'"),
        ("orl.image_weigt=1", "did you mean 'orl.image_weight'"),
        ("nothing=1", "known keys: .*orl.image_weight.*variant"),
        ("train.epochs", "key=value"),
        ("=2", "key=value"),
        ("train.epochs=two", "train.epochs = 'two': must be a valid integer"),
        ("train.epochs=0", "train.epochs = 0: must be greater than or equal to 1"),
        ("train.epochs=true", "valid integer"),
        ("views.crop_area=0.5", "two numbers"),
        ("views.crop_area=0.1,0.2,0.3", "two numbers"),
        ("views.crop_area=1,0.5", "smaller number first"),
        ("views.blur_prob=1,2", "views.blur_prob = 2: must be less than or equal to 1"),
        ("optim.lr_per_256=inf", "finite"),
        ("loader.renderer=gpuu", "did you mean 'gpu'"),
        ("variant=papr", "must be 'official' or 'paper'; did you mean 'paper'"),
        ("train.accumulate=7", "batch_size = 512 is not a multiple of accumulate = 7"),
    ],
)
def test_a_wrong_override_says_what_to_write(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(load_config(), [override])


def test_orl_needs_one_level() -> None:
    with pytest.raises(ConfigError, match="all 0"):
        with_overrides(load_config(), ["image_weight=0", "intra_weight=0", "inter_weight=0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train\nepochs = 2", "not valid TOML"),
        ("[train]\nepoch = 2", r"unknown key 'train\.epoch'; did you mean 'epochs'"),
        ("[trian]\nepochs = 2", r"unknown key 'trian'; did you mean 'train'"),
        ("train = 3", r"train is a section; write \[train\]"),
        ("[views]\ncrop_area = [0.5]", "two numbers"),
        ("[train]\nepochs = '2'", r"train\.epochs = '2': must be a valid integer"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_wrong_recipe_says_what_to_write(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file)
    assert "bad.toml" in str(error.value)


def test_a_missing_recipe_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'coco-r50'"):
        load_config("coco-r5")
    with pytest.raises(ConfigError, match=r"shipped recipes: coco-r50, .*tiny"):
        load_config("elsewhere/recipe")
