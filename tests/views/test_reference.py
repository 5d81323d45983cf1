"""The reference renderer against torchvision's own transform classes, given the same parameters: equal to the last bit."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from orl_fast.config import ViewsConfig
from orl_fast.views.plan import center_crops, roi_crops
from orl_fast.views.reference import ReferenceRenderer
from tests.views.conftest import Photos, byol_plan


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_views_are_torchvisions(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(len(photos))
    views = ViewsConfig(image_size_px=64, blur_prob=(0.6, 0.4), solarize_prob=(0.3, 0.2))
    plan = byol_plan(rows, photos, views, seed=2, epoch=3)
    rendered = list(ReferenceRenderer(photos).render(plan).views.values())
    crops = plan.crops
    for m in range(len(crops.source)):
        image = Image.open(io.BytesIO(photos.data[crops.source[m]])).convert("RGB")
        x1, y1, x2, y2 = (int(edge) for edge in crops.box[m])
        drawn: dict[str, Any] = {
            "RandomResizedCrop": (y1, x1, y2 - y1, x2 - x1),
            "ColorJitter": (torch.from_numpy(crops.order[m].astype(int)), *(float(f) for f in crops.factors[m]), float(crops.hue[m])),
        }
        for name, parameters in drawn.items():
            monkeypatch.setattr(getattr(transforms, name), "get_params", staticmethod(lambda *_, parameters=parameters: parameters))
        steps: list[Any] = [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip(p=float(crops.flip[m]))]
        if crops.hue[m] != 0:
            steps.append(transforms.ColorJitter())
        steps += [transforms.RandomGrayscale(p=float(crops.grayscale[m]))]
        if sigma := float(crops.blur_sigma[m]):
            steps.append(transforms.Lambda(lambda view, sigma=sigma: view.filter(ImageFilter.GaussianBlur(sigma))))
        steps.append(transforms.RandomSolarize(128, p=float(crops.solarize[m])))
        expected = pixels(transforms.Compose(steps)(image))
        assert torch.equal(rendered[m // len(rows)][m % len(rows)], expected)


def test_evaluation_views_are_resize_and_center_crop(photos: Photos) -> None:
    rows = np.arange(len(photos))
    plan = center_crops(rows, heights=photos.heights, widths=photos.widths, resize_px=256, crop_px=224)
    found = ReferenceRenderer(photos).render(plan).views["view"]
    evaluation = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    means = []
    for row in rows:
        expected = pixels(evaluation(Image.open(io.BytesIO(photos.data[row])).convert("RGB")))
        difference = (found[row].int() - expected.int()).abs()
        assert difference.max() <= 1
        means.append(difference.float().mean().item())
    # Arithmetic from another origin: a rounding now and then, and where the scale is a multiple of 1 / 256, at every tie.
    assert np.median(means) < 0.005
    assert max(means) < 0.25


def test_roi_crops_are_cut_out_before_they_are_resized(photos: Photos) -> None:
    boxes = np.array([[10, 20, 110, 180], [0, 0, 40, 40], [5, 5, 6, 6]], np.int16)
    found = ReferenceRenderer(photos).render(roi_crops(np.array([1, 2, 2]), boxes, size_px=48)).views["view"]
    for i, row in enumerate([1, 2, 2]):
        image = Image.open(io.BytesIO(photos.data[row])).convert("RGB").crop(tuple(int(edge) for edge in boxes[i]))
        assert torch.equal(found[i], pixels(image.resize((48, 48), Image.Resampling.BILINEAR)))
