"""The DALI graph against the reference: on the CPU everywhere, on a GPU where there is one."""

import numpy as np
import pytest
import torch

from orl_fast.config import LoaderConfig, ViewsConfig
from orl_fast.errors import ConfigError
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.gpu import DaliRenderer
from orl_fast.views.plan import ViewPlan, center_crops, draw_byol, draw_orl
from orl_fast.views.reference import ReferenceRenderer
from orl_fast.views.renderer import choose_renderer
from tests.views.conftest import Photos, only

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
    "blur": (only(blur_prob=(1.0, 1.0)), 0.4, 6),
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
    for a, b in zip(found.batches, expected.batches, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.uint8
        assert a.device.type == (device or "cpu")
        assert a.is_contiguous(memory_format=torch.channels_last)
    return torch.cat([(a.cpu().int() - b.int()).abs() for a, b in zip(found.batches, expected.batches, strict=True)]).float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TOLERANCES)
def test_each_operation_is_near_the_reference(name: str, device: str | None, photos: Photos) -> None:
    views, mean, p999 = TOLERANCES[name]
    rows = np.arange(0, len(photos), 2)
    plan = draw_byol(rows, seed=3, epoch=1, heights=photos.heights, widths=photos.widths, views=views)
    found = differences(photos, plan, device)
    assert found.mean((1, 2, 3)).max() <= mean
    assert found.mean() <= mean / 2
    assert np.percentile(found.numpy(), 99.9) <= p999


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_two_images_and_of_evaluation(device: str | None, photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    rows = np.arange(0, len(photos), 4)
    sizes = {"heights": photos.heights, "widths": photos.widths}
    views = only(patch_size_px=48, blur_prob=(1.0, 0.0))
    orl = draw_orl(rows, seed=4, epoch=2, views=views, rois=mined[0], pairs=mined[1], terms=("inter", "intra"), **sizes)
    assert differences(photos, orl, device).mean((1, 2, 3)).max() <= 0.5
    assert differences(photos, center_crops(rows, resize_px=64, crop_px=56, **sizes), device).mean((1, 2, 3)).max() <= 0.4


@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_image_is_dropped_and_the_next_batch_is_whole(device: str | None, photos: Photos) -> None:
    rows = np.arange(6)
    damaged = Photos(list(photos.data[:6]), photos.heights, photos.widths)
    damaged.data[2] = np.zeros(300, np.uint8)
    plan = draw_byol(rows, seed=0, epoch=0, heights=photos.heights, widths=photos.widths, views=only(image_size_px=32))
    renderer = DaliRenderer(damaged, num_threads=2, device=torch.device(device) if device else None)
    whole = DaliRenderer(photos, num_threads=2, device=torch.device(device) if device else None).render(plan)
    found = renderer.render(plan)
    assert np.array_equal(found.bad_rows, [2])
    assert np.array_equal(found.rows, [0, 1, 3, 4, 5])
    assert torch.equal(found.batches[1], whole.batches[1][found.rows])
    damaged.data[2] = photos.data[2]
    assert torch.equal(renderer.render(plan).batches[0], whole.batches[0])


def test_the_gpu_is_asked_for_only_where_there_is_one(photos: Photos) -> None:
    trial = draw_byol(np.arange(2), seed=0, epoch=0, heights=photos.heights, widths=photos.widths, views=only(image_size_px=32))
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_renderer(photos, LoaderConfig(renderer="gpu"), trial=trial)
    for kind in ("auto", "cpu", "reference", "dali-cpu"):
        renderer = choose_renderer(photos, LoaderConfig(renderer=kind), trial=trial)  # type: ignore[arg-type]
        assert renderer.render(trial).batches[0].shape == (2, 3, 32, 32)
        renderer.close()


@pytest.mark.gpu
def test_the_faster_renderer_is_measured_and_told(photos: Photos, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.arange(len(photos))
    trial = draw_byol(rows, seed=0, epoch=0, heights=photos.heights, widths=photos.widths, views=ViewsConfig())
    with caplog.at_level("INFO", logger="orl_fast"):
        choose_renderer(photos, LoaderConfig(), trial=trial, device=torch.device("cuda")).close()
    assert "samples/s" in caplog.text
