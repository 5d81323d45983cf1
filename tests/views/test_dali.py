"""The DALI graph against the reference: on the CPU everywhere, on a GPU where there is one."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch

from orl_fast.config import ViewsConfig
from orl_fast.views import Batch, ViewPlan
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined
from orl_fast.views.gpu import DaliRenderer, _Graph
from orl_fast.views.plan import center_crops
from orl_fast.views.reference import ReferenceRenderer
from tests.views.conftest import Photos, byol_plan, only, orl_plan

DEVICES = [None, pytest.param("cuda", marks=pytest.mark.gpu)]
# (views, mean difference of the worst crop, 99.9th percentile) in levels of 255. The percentile lies on the outermost pixels: where the
# filter reaches over the crop's edge DALI repeats the edge, PIL goes without. Solarized values flip where they round to the other side.
TOLERANCES = {
    "resize": (only(flip_prob=0.5), 0.35, 8),
    "brightness": (only(jitter_prob=1.0, brightness=0.4), 0.45, 8),
    "contrast": (only(jitter_prob=1.0, contrast=0.4), 0.45, 8),
    "saturation": (only(jitter_prob=1.0, saturation=0.4), 0.45, 8),
    "hue": (only(jitter_prob=1.0, hue=0.1), 0.7, 10),
    "grayscale": (only(grayscale_prob=1.0), 0.35, 8),
    "blur": (only(blur_prob=(1.0, 1.0)), 1.2, 16),  # PIL rounds six times and repeats the border, DALI rounds once and mirrors it
    "solarize": (only(solarize_prob=(1.0, 1.0)), 0.6, 8),
    # The order of hue, and clipping between brightness and saturation, are not the plan's (see orl_fast.views.gpu).
    "all": (ViewsConfig(image_size_px=112), 6.0, 30),
}


def differences(photos: Photos, plan: ViewPlan, device: str | None) -> torch.Tensor:
    """[V * B, 3, S, S], absolute."""
    renderer = DaliRenderer(photos, num_threads=2, device=torch.device(device) if device else None)
    found, expected = renderer.render(plan), ReferenceRenderer(photos).render(plan)
    renderer.close()
    assert np.array_equal(found.rows, plan.rows)
    assert list(found.views) == list(expected.views)
    pairs = [(found.views[name], expected.views[name]) for name in plan.sizes_px]
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == torch.uint8
        assert a.device.type == (device or "cpu")
        assert a.is_contiguous(memory_format=torch.channels_last)
    return torch.cat([(a.cpu().int() - b.int()).abs() for a, b in pairs]).float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TOLERANCES)
def test_each_operation_is_near_the_reference(name: str, device: str | None, photos: Photos) -> None:
    views, mean, p999 = TOLERANCES[name]
    rows = np.arange(0, len(photos), 2)
    found = differences(photos, byol_plan(rows, photos, views, seed=3, epoch=1), device)
    assert found.mean((1, 2, 3)).max() <= mean
    assert found.mean() <= mean / 2
    assert np.percentile(found.numpy(), 99.9) <= p999


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_two_images_and_of_evaluation(device: str | None, photos: Photos, mined: Mined) -> None:
    rows = np.arange(0, len(photos), 4)
    sizes = {"heights": photos.heights, "widths": photos.widths}
    views = only(patch_size_px=48, blur_prob=(1.0, 0.0))
    orl = orl_plan(rows, photos, mined, views, "query_roi", "partner_roi", "roi", "jittered_roi", seed=4, epoch=2)
    assert differences(photos, orl, device).mean((1, 2, 3)).max() <= 1.3
    assert differences(photos, center_crops(rows, resize_px=64, crop_px=56, **sizes), device).mean((1, 2, 3)).max() <= 0.4


@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_image_is_dropped_and_the_next_batch_is_whole(device: str | None, photos: Photos) -> None:
    rows = np.arange(6)
    damaged = Photos(list(photos.data[:6]), photos.heights, photos.widths)
    damaged.data[2] = np.zeros(300, np.uint8)
    plan = byol_plan(rows, photos, only(image_size_px=32))
    renderer = DaliRenderer(damaged, num_threads=2, device=torch.device(device) if device else None)
    whole = DaliRenderer(photos, num_threads=2, device=torch.device(device) if device else None).render(plan)
    found = renderer.render(plan)
    assert np.array_equal(found.bad_rows, [2])
    assert np.array_equal(found.rows, [0, 1, 3, 4, 5])
    assert torch.equal(found.views["view2"], whole.views["view2"][found.rows])
    damaged.data[2] = photos.data[2]
    assert torch.equal(renderer.render(plan).views["view1"], whole.views["view1"])


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Sources that the graphs refuse, as a GPU's decoder refuses JPEGs that the CPU decodes."""
    sources: set[int] = set()
    run = _Graph.run

    def refusing(self: _Graph, plan: ViewPlan) -> Batch:
        if sources & set(plan.crops.source.tolist()):
            raise RuntimeError("nvJPEG: unsupported\nstack trace")
        return run(self, plan)

    monkeypatch.setattr(_Graph, "run", refusing)
    return sources


def test_an_image_that_only_the_graph_refuses_is_rendered_on_the_cpu_and_counted(
    photos: Photos, cpu: CpuRenderer, refused: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    plan = byol_plan(np.arange(6), photos, only(image_size_px=32))
    renderer = DaliRenderer(photos, num_threads=2)
    refused.add(4)
    found, expected = renderer.render(plan), cpu.render(plan)
    assert np.array_equal(found.rows, plan.rows)
    assert len(found.bad_rows) == len(found.bad_sources) == 0
    assert all(torch.equal(found.views[name], expected.views[name]) for name in plan.sizes_px)
    assert renderer.num_on_cpu == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nvJPEG: unsupported" in caplog.text
    assert "1 so far" in caplog.text
    assert "stack trace" not in caplog.text
    renderer.close()


def test_a_damaged_image_beside_a_refused_one_is_the_only_one_skipped(photos: Photos, cpu: CpuRenderer, refused: set[int]) -> None:
    damaged = Photos(list(photos.data[:6]), photos.heights, photos.widths)
    damaged.data[2] = np.zeros(300, np.uint8)
    plan = byol_plan(np.arange(6), photos, only(image_size_px=32))
    renderer = DaliRenderer(damaged, num_threads=2)
    refused.add(4)
    found, expected = renderer.render(plan), cpu.render(plan)
    assert np.array_equal(found.rows, [0, 1, 3, 4, 5])
    assert (found.bad_rows.tolist(), found.bad_sources.tolist()) == ([2], [2])
    assert torch.equal(found.views["view2"], expected.views["view2"][found.rows])
    assert renderer.num_on_cpu == 1
    renderer.close()


def test_a_graph_that_always_fails_is_not_hidden(photos: Photos, refused: set[int]) -> None:
    """Some batches in a row may be the images' fault: few before the graph has ever run, more afterwards."""
    plan, other = (byol_plan(rows, photos, only(image_size_px=8)) for rows in (np.arange(3), np.arange(3, 6)))
    for runs_first, allowed in ((False, 2), (True, 20)):
        renderer = DaliRenderer(photos, num_threads=2)
        refused.add(1)
        if runs_first:
            renderer.render(plan)  # a success begins the count again
            renderer.render(other)
        before = renderer.num_on_cpu
        for _ in range(allowed):
            renderer.render(plan)
        assert renderer.num_on_cpu == before + allowed
        with pytest.raises(RuntimeError, match="nvJPEG"):
            renderer.render(plan)
        renderer.close()


@pytest.mark.parametrize("device", DEVICES)
def test_batches_rendered_at_once_are_those_rendered_one_by_one(device: str | None, photos: Photos) -> None:
    plans = [byol_plan(np.arange(k, k + 4), photos, only(image_size_px=32), epoch=k) for k in range(12)]
    with closing(DaliRenderer(photos, num_threads=2, device=torch.device(device) if device else None)) as renderer:
        expected = [renderer.render(plan).views["view1"].cpu() for plan in plans]
        with ThreadPoolExecutor(3) as pool:
            found = [batch.views["view1"].cpu() for batch in pool.map(renderer.render, plans)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
