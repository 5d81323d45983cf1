"""What a method asks for: one `ViewSpec` for each view of a sample."""

from dataclasses import dataclass
from typing import Self

from orl_fast.config import Variant, ViewsConfig


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A random resized crop of the whole image, as torchvision draws it; `area` is a share of the image, `aspect` width / height."""

    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class OwnRoi:
    """One of the image's own RoIs, uniformly; the same for all views of a sample."""


@dataclass(frozen=True, kw_only=True)
class JitteredRoi:
    """A box near that RoI (ORL, section 3.1, stage 3)."""

    shift: float = 0.5  # of the center, as a share of the RoI's sides, to either side
    area: tuple[float, float] = (0.5, 2.0)  # relative to the RoI's
    aspect: tuple[float, float] = (0.5, 2.0)  # width / height, absolute
    min_iou: float = 0.5  # overlap with the RoI must exceed it; negative: no overlap is required
    attempts: int = 200  # draws before the RoI itself is taken

    @classmethod
    def of(cls, views: ViewsConfig, variant: Variant) -> Self:
        """As configured; the variant "paper" requires no overlap."""
        min_iou = views.roi_min_iou if variant == "official" else -1.0
        return cls(shift=views.roi_shift, area=views.roi_area, aspect=views.roi_aspect, min_iou=min_iou, attempts=views.roi_attempts)


@dataclass(frozen=True, kw_only=True)
class PairQuery:
    """The image's own RoI of a mined pair: a uniform neighbor, then one of its pairs, uniformly; one pair for all views of a sample."""


@dataclass(frozen=True, kw_only=True)
class PairPartner:
    """The neighbor's RoI of that pair, read from the neighbor's image or from its stored patch."""


Source = RandomCrop | OwnRoi | JitteredRoi | PairQuery | PairPartner


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a view after it is cut out and resized, with torchvision's meaning of each number (see `ViewsConfig`)."""

    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # turns
    grayscale_prob: float = 0.2
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    blur_prob: float = 1.0
    solarize_prob: float = 0.0

    @classmethod
    def pair(cls, views: ViewsConfig) -> tuple[Self, Self]:
        """The augmentations of first and second views, as configured."""
        common = views.model_dump(include=set(cls.__dataclass_fields__) - {"blur_prob", "solarize_prob"})
        first, second = zip(views.blur_prob, views.solarize_prob, strict=True)
        return cls(**common, blur_prob=first[0], solarize_prob=first[1]), cls(**common, blur_prob=second[0], solarize_prob=second[1])


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view of each sample."""

    name: str  # the key of its tensor in a batch
    size_px: int  # its side
    source: Source
    augmentation: Augmentation
    # Number of its random draws, 1 to 15, unlike that of any other view of the method. It is part of the results: a view's draws depend on
    # (seed, epoch, image, stream) alone, so adding or leaving out a view changes no other.
    stream: int

    @property
    def needs_rois(self) -> bool:
        """Whether it is cut from mined RoIs or pairs."""
        return not isinstance(self.source, RandomCrop)
