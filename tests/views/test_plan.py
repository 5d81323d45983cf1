"""What is drawn: torchvision's algorithms, the paper's choices, and nothing that depends on anything else."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from orl_fast.config import ViewsConfig
from orl_fast.philox import uniform
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.plan import PATCH_SIDE_PX, Crops, ViewPlan, draw_byol, draw_orl
from tests.views.conftest import Photos

VIEWS = ViewsConfig()
FIELDS = tuple(Crops.__dataclass_fields__)


def byol(rows: NDArray[np.int64], photos: Photos, *, epoch: int = 0, views: ViewsConfig = VIEWS) -> ViewPlan:
    return draw_byol(rows, seed=5, epoch=epoch, heights=photos.heights, widths=photos.widths, views=views)


def orl(rows: NDArray[np.int64], photos: Photos, mined: tuple[BoxTable, PairTable], *, epoch: int = 0, **options: object) -> ViewPlan:
    sizes = {"heights": photos.heights, "widths": photos.widths}
    return draw_orl(rows, seed=5, epoch=epoch, views=VIEWS, rois=mined[0], pairs=mined[1], **sizes, **options)  # type: ignore[arg-type]


def slot(plan: ViewPlan, term: str, view: int) -> dict[str, NDArray[np.generic]]:
    """The crops of one slot."""
    v = [(s.term, s.view) for s in plan.slots].index((term, view))
    part = slice(v * len(plan.rows), (v + 1) * len(plan.rows))
    return {name: getattr(plan.crops, name)[part] for name in FIELDS}


def torchvision_crop(draws: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params, fed with our draws."""
    log_ratio = math.log(3 / 4), math.log(4 / 3)
    for attempt in range(10):
        area = height * width * (0.08 + draws[2 * attempt] * 0.92)
        ratio = math.exp(log_ratio[0] + draws[2 * attempt + 1] * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[20] * (width - w + 1)), int(draws[21] * (height - h + 1))
            return left, top, left + w, top + h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (100, 100), (30, 900), (900, 30), (1, 1), (2, 500)])
def test_crops_are_torchvisions(height: int, width: int) -> None:
    rows = np.arange(60)
    heights, widths = np.full(60, height, np.int32), np.full(60, width, np.int32)
    plan = draw_byol(rows, seed=9, epoch=4, heights=heights, widths=widths, views=VIEWS)
    for view in (0, 1):
        for row in rows:
            draws = [uniform(9, 4, row, 1 + view, i) for i in range(22)]
            assert tuple(plan.crops.box[view * 60 + row]) == torchvision_crop(draws, height, width)


def test_draws_depend_on_seed_epoch_and_image_alone(photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    rows = np.arange(len(photos))
    whole = orl(rows, photos, mined)
    chosen = np.array([9, 3, 3, 17])
    part = orl(chosen, photos, mined)
    for term, view, _ in whole.slots:
        a, b = slot(whole, term, view), slot(part, term, view)
        assert all(np.array_equal(a[name][chosen], b[name]) for name in FIELDS)
    other = orl(rows, photos, mined, epoch=1)
    assert not np.array_equal(whole.crops.box, other.crops.box)
    assert not np.array_equal(whole.crops.factors, other.crops.factors)


@pytest.mark.parametrize("terms", [("image",), ("intra",), ("inter",), ("image", "inter"), ("intra", "inter")])
def test_leaving_out_terms_does_not_change_the_others(terms: tuple[str, ...], photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    rows = np.arange(len(photos))
    whole, part = orl(rows, photos, mined), orl(rows, photos, mined, terms=terms)
    assert [s.term for s in part.slots] == [term for term in terms for _ in range(2)]
    for term, view, size in part.slots:
        assert size == (224 if term == "image" else 96)
        a, b = slot(whole, term, view), slot(part, term, view)
        assert all(np.array_equal(a[name], b[name]) for name in FIELDS)
    if "image" in terms:
        assert np.array_equal(slot(byol(rows, photos), "image", 1)["box"], slot(part, "image", 1)["box"])


def test_augmentations_have_the_papers_probabilities_and_ranges() -> None:
    num = 20_000
    sizes = np.full(num, 300, np.int32)
    plan = draw_byol(np.arange(num), seed=1, epoch=0, heights=sizes, widths=sizes, views=VIEWS)
    for view, (blur, solarize) in enumerate([(1.0, 0.0), (0.1, 0.2)]):
        crop = slot(plan, "image", view)
        jittered = crop["hue"] != 0
        found = [crop["flip"].mean(), jittered.mean(), crop["grayscale"].mean(), (crop["blur_sigma"] > 0).mean(), crop["solarize"].mean()]
        assert np.allclose(found, [0.5, 0.8, 0.2, blur, solarize], atol=0.012)
        for column, spread in enumerate((0.4, 0.4, 0.2)):
            factors = crop["factors"][jittered, column]
            assert (crop["factors"][~jittered] == 1).all()
            assert abs(factors.min() - (1 - spread)) < 0.01
            assert abs(factors.max() - (1 + spread)) < 0.01
            assert abs(factors.mean() - 1) < 0.01
        assert 0.099 < np.abs(crop["hue"]).max() <= 0.1
        sigma = crop["blur_sigma"][crop["blur_sigma"] > 0]
        assert sigma.min() >= 0.1
        assert sigma.max() <= 2.0
        assert abs(sigma.mean() - 1.05) < 0.05
        _, counts = np.unique(crop["order"][jittered], axis=0, return_counts=True)
        assert len(counts) == 24
        assert np.allclose(counts / jittered.sum(), 1 / 24, atol=0.008)
    # The views of one image are drawn apart.
    a, b = slot(plan, "image", 0), slot(plan, "image", 1)
    assert abs(np.corrcoef(a["box"][:, 0], b["box"][:, 0])[0, 1]) < 0.03
    assert abs((a["flip"] == b["flip"]).mean() - 0.5) < 0.02


def test_partners_are_pairs_of_a_uniform_neighbor(photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    rois, pairs = mined
    rows = np.arange(len(photos))
    seen = np.zeros(len(pairs.query_roi))
    num_epochs = 400
    for epoch in range(num_epochs):
        plan = orl(rows, photos, mined, epoch=epoch, terms=("inter",))
        query, partner = slot(plan, "inter", 0), slot(plan, "inter", 1)
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


def test_intra_views_are_an_own_roi_and_a_near_box(photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    rois, rows = mined[0], np.arange(len(photos))
    moved = 0
    for epoch in range(20):
        plan = orl(rows, photos, mined, epoch=epoch, terms=("intra",))
        own, near = slot(plan, "intra", 0)["box"], slot(plan, "intra", 1)["box"]
        assert np.array_equal(plan.crops.source, np.tile(rows, 2))
        for row in rows:
            assert (rois.of(row) == own[row]).all(axis=1).any()
            assert (near[row] >= 0).all()
            assert near[row][2] <= photos.widths[row]
            assert near[row][3] <= photos.heights[row]
        moved += (own != near).any(axis=1).sum()
    assert moved > 0.8 * 20 * len(rows)


def test_stored_patches_replace_the_partners_that_have_one(photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    rois, pairs = mined
    rows = np.arange(len(photos))
    partners = np.repeat(pairs.neighbors.ravel(), pairs.count.ravel())
    used = np.unique(rois.offsets[partners] + pairs.partner_roi)
    stored = used[::2]
    without, with_patches = orl(rows, photos, mined), orl(rows, photos, mined, patch_rows=stored)
    a, b = slot(without, "inter", 1), slot(with_patches, "inter", 1)
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
