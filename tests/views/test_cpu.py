"""The CPU renderer against the reference, operation by operation and for whole views, on photographs."""

import io
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.config import ViewsConfig
from orl_fast.views import Batch, ViewPlan
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined
from orl_fast.views.plan import Crops, center_crops, roi_crops
from orl_fast.views.reference import ReferenceRenderer
from tests.views.conftest import Photos, byol_plan, only, orl_plan


def assert_near(found: Batch, expected: Batch, *, mean: float, p999: float, most: int) -> None:
    """Levels of 255: the mean absolute difference of each crop at most `mean`, of all the 99.9th percentile and the maximum."""
    assert list(found.views) == list(expected.views)
    for a, b in zip(found.views.values(), expected.views.values(), strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.uint8
        assert a.is_contiguous(memory_format=torch.channels_last)
        difference = (a.int() - b.int()).abs()
        assert difference.float().mean((1, 2, 3)).max() <= mean
        assert np.percentile(difference.numpy(), 99.9) <= p999
        assert difference.max() <= most


# The tolerances of the CPU renderer: (views, mean of the worst crop, 99.9th percentile, maximum).
TOLERANCES = {
    "resize": (only(), 0.35, 1, 2),
    "flip": (only(flip_prob=1.0), 0.35, 1, 2),
    "brightness": (only(jitter_prob=1.0, brightness=0.4), 0.45, 2, 3),
    "contrast": (only(jitter_prob=1.0, contrast=0.4), 0.45, 2, 3),
    "saturation": (only(jitter_prob=1.0, saturation=0.4), 0.45, 2, 4),
    "hue": (only(jitter_prob=1.0, hue=0.1), 0.5, 3, 20),
    "grayscale": (only(grayscale_prob=1.0), 0.35, 1, 2),
    "blur": (only(blur_prob=(1.0, 1.0)), 0.3, 1, 2),
    "solarize": (only(solarize_prob=(1.0, 1.0)), 0.6, 2, 255),  # 127 against 128 becomes 127 against 127, but 127.5 is a coin
    "all": (ViewsConfig(image_size_px=112), 0.7, 4, 255),
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_each_operation_is_near_the_reference(name: str, photos: Photos, cpu: CpuRenderer) -> None:
    views, mean, p999, most = TOLERANCES[name]
    plan = byol_plan(np.arange(len(photos)), photos, views, seed=3, epoch=1)
    assert_near(cpu.render(plan), ReferenceRenderer(photos).render(plan), mean=mean, p999=p999, most=most)


def test_orl_views_are_near_the_reference(photos: Photos, mined: Mined, cpu: CpuRenderer) -> None:
    plan = orl_plan(np.arange(0, len(photos), 3), photos, mined, ViewsConfig(), seed=4, epoch=2)
    assert_near(cpu.render(plan), ReferenceRenderer(photos).render(plan), mean=0.7, p999=4, most=255)


@pytest.mark.parametrize("size", [8, 33, 96, 224, 300])
def test_boxes_of_any_shape_and_place(size: int, photos: Photos, cpu: CpuRenderer) -> None:
    rows = np.arange(len(photos))
    whole = np.stack([rows * 0, rows * 0, photos.widths, photos.heights], axis=1)
    line = np.stack([photos.widths - 1, rows * 0, photos.widths, photos.heights], axis=1)
    dot = np.stack([photos.widths - 1, photos.heights - 1, photos.widths, photos.heights], axis=1)
    small = np.array([[3.4, 6.5, 20.2, 18.5]]).repeat(len(rows), axis=0)  # rounded before it is cut out
    boxes = np.concatenate([whole, line, dot, small]).astype(np.float32)
    plan = roi_crops(np.tile(rows, 4), boxes, size_px=size)
    assert_near(cpu.render(plan), ReferenceRenderer(photos).render(plan), mean=0.45 if size > 8 else 0.7, p999=2, most=3)


@pytest.mark.parametrize(("resize_px", "crop_px"), [(256, 224), (64, 64), (40, 33)])
def test_evaluation_views_read_beyond_the_box(resize_px: int, crop_px: int, photos: Photos, cpu: CpuRenderer) -> None:
    plan = center_crops(np.arange(len(photos)), heights=photos.heights, widths=photos.widths, resize_px=resize_px, crop_px=crop_px)
    assert_near(cpu.render(plan), ReferenceRenderer(photos).render(plan), mean=0.4, p999=1, most=2)


def test_a_plain_color_stays_itself_under_resize_and_blur() -> None:
    for level in (0, 1, 127, 254, 255):
        encoded = io.BytesIO()
        Image.new("RGB", (1000, 700), (level,) * 3).save(encoded, "PNG")
        photo = Photos([np.frombuffer(encoded.getvalue(), np.uint8)], np.array([700], np.int32), np.array([1000], np.int32))
        crops = Crops.plain(np.zeros(6, np.int64), np.array([[0, 0, 1000, 700]] * 6, np.float32))
        crops.blur_sigma[:] = [0, 0.1, 0.5, 1.3, 2, 8]
        plan = ViewPlan(rows=np.zeros(6, np.int64), sizes_px={"view": 40}, crops=crops)
        with closing(CpuRenderer(photo, num_threads=1)) as renderer:
            assert (renderer.render(plan).views["view"] == level).all()


def test_threads_and_batches_do_not_change_a_byte(photos: Photos, mined: Mined, cpu: CpuRenderer) -> None:
    rows = np.arange(len(photos))
    whole = cpu.render(orl_plan(rows, photos, mined, ViewsConfig()))
    with closing(CpuRenderer(photos, num_threads=5)) as other:
        for part in (rows[:1], rows[5:18]):
            found = other.render(orl_plan(part, photos, mined, ViewsConfig()))
            assert all(torch.equal(found.views[name], view[part]) for name, view in whole.views.items())


def test_bad_sources_are_dropped_from_all_views_and_nothing_else_changes(photos: Photos, mined: Mined) -> None:
    rows = np.arange(len(photos))
    views = ViewsConfig(image_size_px=32, patch_size_px=24)
    plan = orl_plan(rows, photos, mined, views, seed=1)
    damaged = Photos(list(photos.data), photos.heights, photos.widths)
    damaged.data[3], damaged.data[11] = damaged.data[3][:300], np.zeros(500, np.uint8)
    needs_bad = np.isin(plan.crops.source, [3, 11]).reshape(6, -1).any(axis=0)
    assert needs_bad.sum() >= 2
    for renderer in (CpuRenderer(damaged, num_threads=2), ReferenceRenderer(damaged)):
        found = renderer.render(plan)
        assert np.array_equal(found.bad_sources, [3, 11])
        assert np.array_equal(found.rows, rows[~needs_bad])
        assert np.array_equal(found.bad_rows, rows[needs_bad])
        whole = type(renderer)(photos).render(plan)
        for name, view in found.views.items():
            assert torch.equal(view, whole.views[name][torch.from_numpy(~needs_bad)])
            assert view.is_contiguous(memory_format=torch.channels_last)
        renderer.close()


def test_all_sources_bad_gives_empty_batches(photos: Photos) -> None:
    damaged = Photos([np.zeros(10, np.uint8)] * 3, photos.heights[:3], photos.widths[:3])
    with closing(CpuRenderer(damaged, num_threads=1)) as renderer:
        found = renderer.render(roi_crops(np.arange(3), np.array([[0, 0, 50, 50]] * 3, np.int16), size_px=32))
    assert found.views["view"].shape == (0, 3, 32, 32)
    assert np.array_equal(found.bad_rows, np.arange(3))
