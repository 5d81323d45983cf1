"""The configuration: the paper's numbers as defaults, and sections that cannot hold what makes no sense."""

import pytest
from pydantic import ValidationError

from orl_fast.config import Config, MiningConfig, TrainConfig, ViewsConfig, digest
from orl_fast.methods.orl import OrlConfig
from orl_fast.recipe import config_to_dict, load_config
from orl_fast.train.step import learning_rate

# The paper's section 3 and appendices A and B; where the published implementation differs from it, that.
PAPER = {
    "views": {
        "image_size_px": 224, "patch_size_px": 96, "crop_area": [0.08, 1], "crop_aspect": [3 / 4, 4 / 3], "flip_prob": 0.5,
        "jitter_prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale_prob": 0.2,
        "blur_sigma_px": [0.1, 2], "blur_prob": [1, 0.1], "solarize_prob": [0, 0.2],
        "roi_shift": 0.5, "roi_area": [0.5, 2], "roi_aspect": [0.5, 2], "roi_min_iou": 0.5, "roi_attempts": 200,
    },
    "model": {"backbone": "resnet50", "projector_hidden": 4096, "projector_out": 256, "predictor_hidden": 4096},
    "optim": {"lr_per_256": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "warmup_epochs": 4, "ema_momentum": 0.99},
    "train": {"epochs": 800, "batch_size": 512, "sync_bn": True, "joined_views": False},
    "orl": {"image_weight": 1, "intra_weight": 1, "inter_weight": 1},
    "mining": {
        "resize_px": 256, "crop_px": 224, "num_neighbors": 10, "min_side_px": 96, "max_aspect": 3, "max_iou": 0.5, "max_rois": 100,
        "roi_size_px": 224, "pair_ratio": 0.1,
    },
}  # fmt: skip


def test_the_defaults_are_the_papers() -> None:
    config = load_config("coco-r50")
    found = config_to_dict(config)
    assert {section: {key: found[section][key] for key in values} for section, values in PAPER.items()} == PAPER
    assert found["variant"] == "official"
    without_warmup = load_config("coco-r50", overrides=["warmup_epochs=0"])
    assert learning_rate(0, without_warmup, steps_per_epoch=1) == 0.4  # 0.2 × 512 / 256
    assert config == load_config()


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"epochs": "2"},
        {"epochs": True},
        {"epochs": 2.0},
        {"batch_size": 12, "accumulate": 5},
        {"checkpoint_every_min": float("nan")},
        {"checkpoint_every_min": -1.0},
        {"epoch": 2},
    ],
)
def test_a_section_refuses_what_makes_no_sense(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(**values)  # type: ignore[arg-type]


def test_values_are_checked_together_and_never_change() -> None:
    with pytest.raises(ValidationError, match="smaller number first"):
        ViewsConfig(crop_area=(1.0, 0.5))
    with pytest.raises(ValidationError, match="exceeds"):
        MiningConfig(crop_px=300)
    with pytest.raises(ValidationError, match="nothing would be learned"):
        OrlConfig(image_weight=0, intra_weight=0, inter_weight=0)
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.epochs = 3  # type: ignore[misc]


def test_a_methods_section_is_found_by_its_class() -> None:
    assert load_config(overrides=["intra_weight=0.5"]).section(OrlConfig) == OrlConfig(intra_weight=0.5)
    assert Config().section(OrlConfig) == OrlConfig()
    assert OrlConfig(intra_weight=0).weights == {"image": 1, "inter": 1}


def test_digests_follow_the_values_and_not_their_order() -> None:
    assert digest({"a": 1, "b": [2.5, "x"]}) == digest({"b": [2.5, "x"], "a": 1}) != digest({"a": 1, "b": [2.5, "y"]})
    assert digest({"a": 1}) == "f9d86028c6e0d64e"  # the same on every machine and in every version: tables on disk bear it
