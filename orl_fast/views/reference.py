"""The reference renderer: PIL decodes, torchvision's own functions do the rest, one crop at a time. The oracle of the other renderers."""

import contextlib
import io

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms import functional as tv  # type: ignore[import-untyped]

from orl_fast.shards.pixels import Decoded
from orl_fast.views.plan import AnyImage, Batch, Crops, ImageSource, ViewPlan, without_bad

_ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
_UNCHANGED = (1, 1, 1, 0)


class ReferenceRenderer:
    """Slow and plain (see `orl_fast.views.plan.Renderer`)."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def render(self, plan: ViewPlan) -> Batch:
        images: dict[int, Image.Image] = {}
        sources = np.unique(plan.crops.source)
        for source, data in zip(sources.tolist(), self._source.views(sources), strict=True):
            with contextlib.suppress(OSError, SyntaxError, ValueError):  # what PIL raises for damaged files
                images[source] = decode(data)
        pixels = []
        for v, size_px in enumerate(plan.sizes_px.values()):
            batch = np.zeros((len(plan.rows), size_px, size_px, 3), np.uint8)
            for b in range(len(plan.rows)):
                m = v * len(plan.rows) + b
                if image := images.get(int(plan.crops.source[m])):
                    batch[b] = np.asarray(render_crop(image, plan.crops, m, size_px=size_px, beyond_box=plan.beyond_box))
            pixels.append(torch.from_numpy(batch))
        return without_bad(plan, pixels, sources[[source not in images for source in sources.tolist()]])

    def close(self) -> None:
        """Nothing is held."""


def decode(data: AnyImage) -> Image.Image:
    """An RGB image from encoded bytes, or from pixels: fewer than the image has are enlarged."""
    if isinstance(data, Decoded):
        return Image.fromarray(data.pixels).resize((data.width, data.height), Image.Resampling.BILINEAR)  # a copy where they are equal
    with Image.open(io.BytesIO(data.data)) as image:
        return image.convert("RGB")


def render_crop(image: Image.Image, crops: Crops, m: int, *, size_px: int, beyond_box: bool = False) -> Image.Image:
    """Crop `m` of `crops`, read from its decoded source."""
    left, top, right, bottom = (float(edge) for edge in crops.box[m])
    if beyond_box:
        box = (max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height)))
        view = image.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box)
    else:
        where = (round(top), round(left), round(bottom) - round(top), round(right) - round(left))
        view = tv.resized_crop(image, *where, size=[size_px, size_px], interpolation=InterpolationMode.BILINEAR, antialias=True)
    if crops.flip[m]:
        view = tv.hflip(view)
    amounts = [*crops.factors[m].tolist(), float(crops.hue[m])]
    for op in crops.order[m]:
        if amounts[op] != _UNCHANGED[op]:
            view = _ADJUST[op](view, amounts[op])
    if crops.grayscale[m]:
        view = tv.to_grayscale(view, num_output_channels=3)
    if crops.blur_sigma[m] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(crops.blur_sigma[m])))
    return tv.solarize(view, 128) if crops.solarize[m] else view
