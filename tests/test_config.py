"""The configuration: recipes, overrides, and messages that name the nearest key."""

from pathlib import Path

import pytest

from orl_fast.config import Config, config_from_dict, config_to_dict, config_to_toml, load_config, recipe_names, with_overrides
from orl_fast.errors import ConfigError


def test_the_default_recipe_is_the_papers() -> None:
    config = load_config("coco-r50")
    assert config == Config()
    assert (config.views.image_size_px, config.views.patch_size_px) == (224, 96)
    assert config.views.crop_area == (0.08, 1.0)
    assert config.views.crop_aspect == (3 / 4, 4 / 3)
    jitter = (config.views.jitter_prob, config.views.brightness, config.views.contrast, config.views.saturation, config.views.hue)
    assert jitter == (0.8, 0.4, 0.4, 0.2, 0.1)
    assert (config.views.blur_prob, config.views.solarize_prob, config.views.blur_sigma_px) == ((1.0, 0.1), (0.0, 0.2), (0.1, 2.0))
    assert (config.model.projector_hidden, config.model.projector_out, config.model.predictor_hidden) == (4096, 256, 4096)
    assert (config.optim.lr_per_256, config.optim.momentum, config.optim.weight_decay) == (0.2, 0.9, 1e-4)
    assert (config.optim.warmup_epochs, config.optim.ema_momentum) == (4.0, 0.99)
    assert (config.train.epochs, config.train.batch_size) == (800, 512)
    mining = config.mining
    assert (mining.num_neighbors, mining.min_side_px, mining.max_aspect, mining.max_iou, mining.max_rois) == (10, 96, 3.0, 0.5, 100)
    assert (mining.resize_px, mining.crop_px, mining.roi_size_px, mining.pair_ratio) == (256, 224, 224, 0.1)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "copy.toml").write_text(config_to_toml(config))
    assert load_config(tmp_path / "copy.toml") == config
    assert config_from_dict(config_to_dict(config), where="copy") == config


def test_overrides_take_dotted_and_unique_bare_keys() -> None:
    config = load_config(overrides=["train.epochs=2", "lr_per_256=0.5", "crop_area=0.2,1", "compat=paper", "compile=true"])
    assert (config.train.epochs, config.optim.lr_per_256, config.views.crop_area) == (2, 0.5, (0.2, 1.0))
    assert (config.compat, config.train.compile) == ("paper", True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", "train.epochs"),
        ("epohcs=2", "train.epochs"),
        ("train.epochs", "key=value"),
        ("train.epochs=two", "use int"),
        ("train.epochs=0", "1 or more"),
        ("train.epochs=true", "use int"),
        ("views.crop_area=0.5", "2 numbers"),
        ("views.crop_area=1,0.5", "smaller number first"),
        ("optim.lr_per_256=inf", "finite"),
        ("loader.renderer=gpuu", "did you mean 'gpu'"),
        ("train.accumulate=7", "not a multiple"),
    ],
)
def test_a_wrong_override_says_what_to_write(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(Config(), [override])


def test_orl_needs_one_term() -> None:
    with pytest.raises(ConfigError, match="all 0"):
        with_overrides(Config(), ["image_weight=0", "intra_weight=0", "inter_weight=0"])


def test_a_wrong_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"coco-r50"):
        load_config("coco-r5")
    (tmp_path / "bad.toml").write_text("[train\nepochs = 2")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "key.toml").write_text("[train]\nepoch = 2")
    with pytest.raises(ConfigError, match=r"train\.epoch'; did you mean 'epochs'"):
        load_config(tmp_path / "key.toml")
    (tmp_path / "section.toml").write_text("train = 3")
    with pytest.raises(ConfigError, match="section"):
        load_config(tmp_path / "section.toml")
