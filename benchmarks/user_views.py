"""Views of other methods, as a user's own list of `ViewSpec`s: SimCLR's two and DINO's ten, against other toolkits' ways to make them.

All contenders take the same JPEGs (theirs in a torch DataLoader), use no worker and draw from the same distributions. Resampling is each
toolkit's own: bicubic in solo-learn's and DINO's transforms, bilinear in lightly's SimCLR and in ours; all of them antialias.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.harness import Contender, Row, available, compare
from benchmarks.loading import (
    MEAN,
    STD,
    Data,
    Normalized,
    PilBlur,
    PilSolarize,
    Sample,
    data_loader,
    decode_tensor,
    ours,
    pixel_source,
    torchcodec_is_there,
)
from orl_fast.shards import ShardIndex
from orl_fast.shards.images import decode_rgb
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.plan import Renderer
from orl_fast.views.specs import Augmentation, RandomCrop, ViewSpec

_SIMCLR = Augmentation(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_prob=0.5)
SIMCLR_VIEWS = tuple(ViewSpec(name=f"view_{i}", size_px=224, source=RandomCrop(), augmentation=_SIMCLR, stream=i) for i in (1, 2))

_LARGE, _SMALL = RandomCrop(area=(0.4, 1.0)), RandomCrop(area=(0.05, 0.4))
DINO_VIEWS = (
    ViewSpec(name="global_0", size_px=224, source=_LARGE, augmentation=Augmentation(blur_prob=1.0), stream=1),
    ViewSpec(name="global_1", size_px=224, source=_LARGE, augmentation=Augmentation(blur_prob=0.1, solarize_prob=0.2), stream=2),
    *(ViewSpec(name=f"local_{i}", size_px=96, source=_SMALL, augmentation=Augmentation(blur_prob=0.5), stream=3 + i) for i in range(8)),
)


def run(data: Data, stored_pixels: ShardIndex, *, num_samples: int, rounds: int) -> list[Row]:
    """Samples/s on the one core that the process is pinned to, by CPU time."""
    groups = {
        "two views of 224 px (SimCLR), one core, CPU time": (_simclr_transforms(), SIMCLR_VIEWS),
        "ten views, 2 x 224 and 8 x 96 px (DINO), one core, CPU time": (_dino_transforms(), DINO_VIEWS),
    }
    rows: list[Row] = []
    samples = data.samples(num_samples)
    for group, (theirs, specs) in groups.items():
        with ExitStack() as stack:
            contenders = [Contender(name=name, run=data_loader(samples, views, 0)) for name, views in theirs.items()]
            renderers: dict[str, Renderer] = {
                "ours, JPEG bytes": CpuRenderer(data, num_threads=1),
                "ours, pixel shards": CpuRenderer(pixel_source(stored_pixels), num_threads=1),
                "ours, pixel shards, normalized floats": Normalized(CpuRenderer(pixel_source(stored_pixels), num_threads=1)),
            }
            contenders += [ours(name, data, renderer, stack, num_samples, workers=0, specs=specs) for name, renderer in renderers.items()]
            rows += compare(contenders, unit="samples/s", rounds=rounds, group=group, clock=time.process_time)
    return rows


Transform = Callable[[Any], Any]
Views = Callable[[Sample], list[torch.Tensor]]


def _simclr_transforms() -> dict[str, Views]:
    """solo-learn's and lightly's transforms of a PIL image, and torchvision's v2 classes on tensors.

    solo-learn of PyPI (1.0.2) requires torch 1.9.1, so its pipeline is built here from torchvision's classes, in the order that it has.
    """
    jitter, gray = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2), transforms.RandomGrayscale(0.2)
    crop = transforms.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    common = [transforms.RandomApply([jitter], p=0.8), gray, PilBlur(0.5), transforms.RandomHorizontalFlip()]
    solo_learn = transforms.Compose([crop, *common, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    found: dict[str, Views] = {"solo-learn's transforms (rebuilt: torchvision, PIL)": _OfImage([solo_learn] * 2)}
    if _lightly_is_there():
        from lightly.transforms import SimCLRTransform

        found["lightly's SimCLRTransform"] = _OfImage([SimCLRTransform()])
    if torchcodec_is_there():
        found["torchcodec + torchvision v2 on tensors"] = _OfTensor(
            [
                v2.RandomResizedCrop(224, scale=(0.08, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            ]
        )
    return found


def _dino_transforms() -> dict[str, Views]:
    """The augmentation that DINO's authors published, built from torchvision's classes, and lightly's."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    first = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)]
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]

    def view(spec: ViewSpec) -> Transform:
        assert isinstance(spec.source, RandomCrop)
        bicubic = transforms.InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(spec.size_px, scale=spec.source.area, interpolation=bicubic)
        chosen = [PilBlur(spec.augmentation.blur_prob), PilSolarize(spec.augmentation.solarize_prob)]
        composed: Transform = transforms.Compose([crop, *first, *chosen, *last])
        return composed

    found: dict[str, Views] = {"DINO's transforms (rebuilt: torchvision, PIL)": _OfImage([view(spec) for spec in DINO_VIEWS])}
    if _lightly_is_there():
        from lightly.transforms import DINOTransform

        found["lightly's DINOTransform"] = _OfImage([DINOTransform(n_local_views=8)])
    return found


def _lightly_is_there() -> bool:
    return available("lightly.transforms", needed_by="lightly's transforms", remedy="pip install 'orl-fast[bench-lightly]'")


class _OfImage:
    """Transforms of a PIL image; each gives a view or a list of views."""

    def __init__(self, given: Sequence[Transform]) -> None:
        self.transforms = given

    def __call__(self, sample: Sample) -> list[torch.Tensor]:
        image = decode_rgb(sample.image)
        views: list[torch.Tensor] = []
        for transform in self.transforms:
            made = transform(image)
            views += made if isinstance(made, list) else [made]
        return views


class _OfTensor:
    """Two views of a tensor; they stay uint8, as ours do."""

    def __init__(self, steps: Sequence[Transform]) -> None:
        self.view = v2.Compose(steps)

    def __call__(self, sample: Sample) -> list[torch.Tensor]:
        image = decode_tensor(sample.image)
        return [self.view(image) for _ in range(2)]
