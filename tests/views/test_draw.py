"""What is drawn for the views that are asked for: the paper's choices, and nothing that depends on anything else."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from orl_fast.config import Config, ViewsConfig
from orl_fast.errors import MissingStageError
from orl_fast.methods import BYOL
from orl_fast.views import PairPartner, RandomCrop, ViewPlan, ViewSpec
from orl_fast.views.draw import Mined, draw_plan
from orl_fast.views.patches import PATCH_SIDE_PX
from orl_fast.views.plan import Crops
from tests.views.conftest import Photos, byol_plan, orl_plan, specs_of

VIEWS = ViewsConfig()
FIELDS = tuple(Crops.__dataclass_fields__)
ALL = tuple(spec.name for spec in specs_of(VIEWS))


def view(plan: ViewPlan, name: str) -> dict[str, NDArray[np.generic]]:
    """The crops of one view."""
    v = list(plan.sizes_px).index(name)
    part = slice(v * len(plan.rows), (v + 1) * len(plan.rows))
    return {field: getattr(plan.crops, field)[part] for field in FIELDS}


def same(plan: ViewPlan, other: ViewPlan, name: str) -> bool:
    a, b = view(plan, name), view(other, name)
    return all(np.array_equal(a[field], b[field]) for field in FIELDS)


def test_draws_depend_on_seed_epoch_and_image_alone(photos: Photos, mined: Mined) -> None:
    rows = np.arange(len(photos))
    whole = orl_plan(rows, photos, mined, VIEWS, seed=5)
    chosen = np.array([9, 3, 3, 17])
    part = orl_plan(chosen, photos, mined, VIEWS, seed=5)
    for name in ALL:
        a, b = view(whole, name), view(part, name)
        assert all(np.array_equal(a[field][chosen], b[field]) for field in FIELDS)
    for other in (orl_plan(rows, photos, mined, VIEWS, seed=5, epoch=1), orl_plan(rows, photos, mined, VIEWS, seed=6)):
        assert not np.array_equal(whole.crops.box, other.crops.box)
        assert not np.array_equal(whole.crops.factors, other.crops.factors)


@pytest.mark.parametrize(
    "names",
    [("view1", "view2"), ("view2",), ("roi", "jittered_roi"), ("partner_roi",), ("jittered_roi", "view1"), ALL[::-1], ALL[3:] + ALL[:3]],
)
def test_leaving_out_or_reordering_views_changes_no_other(names: tuple[str, ...], photos: Photos, mined: Mined) -> None:
    rows = np.arange(len(photos))
    whole, part = (orl_plan(rows, photos, mined, VIEWS, *chosen, seed=5) for chosen in ((), names))
    assert tuple(part.sizes_px) == names
    assert all(part.sizes_px[name] == (224 if name.startswith("view") else 96) for name in names)
    assert all(same(whole, part, name) for name in names)


def test_adding_views_changes_no_other(photos: Photos, mined: Mined) -> None:
    rows, specs = np.arange(len(photos)), specs_of(VIEWS)
    more = [replace(specs[0], name=f"crop{i}", size_px=32, source=RandomCrop(area=(0.05, 0.14)), stream=8 + i) for i in range(4)]
    sizes = {"heights": photos.heights, "widths": photos.widths}
    found = draw_plan(rows, [*more[:2], *specs, *more[2:]], seed=5, epoch=0, mined=mined, **sizes)
    expected = orl_plan(rows, photos, mined, VIEWS, seed=5)
    assert all(same(found, expected, name) for name in ALL)
    boxes = [view(found, spec.name)["box"] for spec in more]
    assert all(not np.array_equal(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    areas = np.stack([(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (photos.heights * photos.widths) for box in boxes])
    assert areas.max() < 0.15


def test_orls_image_views_are_byols(photos: Photos, mined: Mined) -> None:
    rows = np.arange(len(photos))
    assert BYOL.views(Config(views=VIEWS)) == specs_of(VIEWS, "view1", "view2")
    byol = byol_plan(rows, photos, VIEWS, seed=5)
    assert all(same(byol, orl_plan(rows, photos, mined, VIEWS, seed=5), name) for name in ("view1", "view2"))


def test_partners_are_pairs_of_a_uniform_neighbor(photos: Photos, mined: Mined) -> None:
    rois, pairs = mined.rois, mined.pairs
    rows = np.arange(len(photos))
    seen = np.zeros(len(pairs.query_roi))
    num_epochs = 400
    for epoch in range(num_epochs):
        plan = orl_plan(rows, photos, mined, VIEWS, "query_roi", "partner_roi", seed=5, epoch=epoch)
        query, partner = view(plan, "query_roi"), view(plan, "partner_roi")
        assert np.array_equal(query["source"], rows)
        for row in rows:
            matches = [
                pairs.first[row, k] + p
                for k in np.flatnonzero(pairs.neighbors[row] == partner["source"][row])
                for p in range(pairs.count[row, k])
                if np.array_equal(rois.of(row)[pairs.query_roi[pairs.first[row, k] + p]], query["box"][row])
                and np.array_equal(rois.of(pairs.neighbors[row, k])[pairs.partner_roi[pairs.first[row, k] + p]], partner["box"][row])
            ]
            assert matches
            seen[matches] += 1 / len(matches)
    per_neighbor = np.add.reduceat(seen, pairs.first.ravel()) / num_epochs
    assert np.allclose(per_neighbor, 1 / 3, atol=0.11)
    assert np.allclose(seen, np.repeat(per_neighbor / pairs.count.ravel(), pairs.count.ravel()) * num_epochs, atol=45)


def test_intra_views_are_an_own_roi_and_a_near_box(photos: Photos, mined: Mined) -> None:
    rois, rows = mined.rois, np.arange(len(photos))
    moved = 0
    for epoch in range(20):
        plan = orl_plan(rows, photos, mined, VIEWS, "roi", "jittered_roi", seed=5, epoch=epoch)
        own, near = view(plan, "roi")["box"], view(plan, "jittered_roi")["box"]
        assert np.array_equal(plan.crops.source, np.tile(rows, 2))
        for row in rows:
            assert (rois.of(row) == own[row]).all(axis=1).any()
            assert (near[row] >= 0).all()
            assert near[row][2] <= photos.widths[row]
            assert near[row][3] <= photos.heights[row]
        moved += (own != near).any(axis=1).sum()
    assert moved > 0.8 * 20 * len(rows)


def test_stored_patches_replace_the_partners_that_have_one(photos: Photos, mined: Mined, monkeypatch: pytest.MonkeyPatch) -> None:
    rois, pairs = mined.rois, mined.pairs
    rows = np.arange(len(photos))
    partners = np.repeat(pairs.neighbors.ravel(), pairs.count.ravel())
    used = np.unique(rois.offsets[partners] + pairs.partner_roi)
    stored = used[::2]
    without = orl_plan(rows, photos, mined, VIEWS, seed=5)
    monkeypatch.setattr(Mined, "patch_rows", stored)
    with_patches = orl_plan(rows, photos, mined, VIEWS, seed=5)
    a, b = view(without, "partner_roi"), view(with_patches, "partner_roi")
    num_read = 0
    for row in rows:
        number = b["source"][row] - len(photos)
        if number < 0:
            assert b["source"][row] == a["source"][row]
            assert np.array_equal(b["box"][row], a["box"][row])
        else:
            num_read += 1
            assert np.array_equal(rois.boxes[stored[number]], a["box"][row])
            assert rois.offsets[a["source"][row]] <= stored[number] < rois.offsets[a["source"][row] + 1]
            assert tuple(b["box"][row]) == (0, 0, PATCH_SIDE_PX, PATCH_SIDE_PX)
    assert 0 < num_read < len(rows)
    assert all(np.array_equal(a[name], b[name]) for name in FIELDS if name not in ("source", "box"))
    assert all(same(without, with_patches, name) for name in ALL if name != "partner_roi")


def test_views_of_rois_need_mined_ones(photos: Photos) -> None:
    spec = ViewSpec(name="p", size_px=32, source=PairPartner(), augmentation=specs_of(VIEWS)[0].augmentation, stream=1)
    with pytest.raises(MissingStageError, match=r"PairPartner.*orl-fast mine"):
        draw_plan(np.arange(2), [spec], seed=0, epoch=0, heights=photos.heights, widths=photos.widths)


def test_the_plan_of_some_samples_is_the_plan_drawn_for_them(photos: Photos, mined: Mined) -> None:
    rows = np.arange(len(photos))
    kept = rows % 3 != 1
    part = orl_plan(rows, photos, mined, VIEWS).of_samples(kept)
    drawn = orl_plan(rows[kept], photos, mined, VIEWS)
    assert np.array_equal(part.rows, drawn.rows)
    assert all(same(part, drawn, name) for name in ALL)
