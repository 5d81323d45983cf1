import pytest

from orl_fast.config import Config
from orl_fast.methods import BYOL, ORL
from orl_fast.views import JitteredRoi, OwnRoi, PairPartner, PairQuery
from tests.methods.formulas import symmetric_loss, unlike_at_the_start
from tests.synthetic import small_config, synthetic_batch

_LEVELS = {"image": ("view1", "view2"), "intra": ("roi", "jittered_roi"), "inter": ("query_roi", "partner_roi")}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.5), (0.0, 2.0, 0.0)])
def test_the_loss_is_its_formula_and_leaves_out_levels_of_weight_0(weights: tuple[float, float, float]) -> None:
    by_level = dict(zip(_LEVELS, weights, strict=True))
    config = small_config(*(f"{level}_weight={weight}" for level, weight in by_level.items()))
    method, views = unlike_at_the_start("orl", config), synthetic_batch("orl", config, 4).views
    assert isinstance(method, ORL)
    used = [level for level, weight in by_level.items() if weight]
    assert list(method.predictors) == used
    assert list(views) == [name for level in used for name in _LEVELS[level]]
    expected = {
        level: symmetric_loss(method.online, method.target, method.predictors[level], *(views[name] for name in _LEVELS[level]))
        for level in used
    }
    losses = method.loss(views)
    assert {level: losses[level].item() for level in used} == pytest.approx(expected, rel=1e-5)
    assert set(losses) == {"loss", *used}
    assert not any(losses[level].requires_grad for level in used)
    assert losses["loss"].item() == pytest.approx(sum(by_level[level] * expected[level] for level in used), rel=1e-5)


def test_joined_views_make_one_pass_for_each_size() -> None:
    for joined, expected in (("false", 6), ("true", 2)):
        config = small_config(f"joined_views={joined}")
        method = ORL(config)
        method.loss(synthetic_batch("orl", config, 4).views)
        assert method.online.projector[1].num_batches_tracked == method.target.projector[1].num_batches_tracked == expected


def test_views_are_cut_from_what_the_paper_says() -> None:
    specs = {spec.name: spec for spec in ORL.views(Config())}
    assert tuple(specs.values())[:2] == BYOL.views(Config())
    patches = [specs[name] for name in ("roi", "jittered_roi", "query_roi", "partner_roi")]
    assert [type(spec.source) for spec in patches] == [OwnRoi, JitteredRoi, PairQuery, PairPartner]
    assert {spec.size_px for spec in patches} == {96}
    assert [spec.augmentation for spec in patches] == [specs["view1"].augmentation, specs["view2"].augmentation] * 2
    assert [(spec.augmentation.blur_prob, spec.augmentation.solarize_prob) for spec in patches[:2]] == [(1, 0), (0.1, 0.2)]


def test_a_jittered_roi_needs_no_overlap_in_the_papers_variant() -> None:
    official, paper = (
        next(spec.source for spec in ORL.views(Config(variant=variant)) if spec.name == "jittered_roi") for variant in ("official", "paper")
    )
    assert official == JitteredRoi(min_iou=0.5)
    assert isinstance(paper, JitteredRoi)
    assert paper.min_iou < 0
