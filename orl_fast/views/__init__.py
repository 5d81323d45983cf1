"""Views: asked for as specs, drawn on the host as plans, rendered by interchangeable renderers, delivered by a loader."""

from orl_fast.views.loader import ViewLoader
from orl_fast.views.plan import Batch, ViewPlan
from orl_fast.views.specs import Augmentation, JitteredRoi, OwnRoi, PairPartner, PairQuery, RandomCrop, ViewSpec

__all__ = [
    "Augmentation", "Batch", "JitteredRoi", "OwnRoi", "PairPartner", "PairQuery", "RandomCrop", "ViewLoader", "ViewPlan", "ViewSpec",
]  # fmt: skip
