"""Evaluations of backbones, one module each, found by name in `EVALS`: CONTRIBUTING says what a module defines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from orl_fast.distributed import Ranks

EVALS = {  # modules of this package, a hyphen standing for an underscore, imported when they are used
    "probe": "Linear probe: logistic regression on frozen features.",
    "knn": "Weighted nearest neighbors by cosine similarity.",
    "corloc": "Whether the best corresponding RoIs are on objects: stage 2 by itself.",
    "voc07": "VOC07 classification: linear SVMs on five feature levels, full or low-shot.",
    "linear": "Linear classifiers on five feature levels (ImageNet, Places205, iNaturalist18).",
    "semi": "Fine-tuning on 1 % or 10 % of the labels (ImageNet).",
    "detect": "COCO detection and instance segmentation (Mask R-CNN).",
}


def _alone() -> "Ranks":
    from orl_fast.distributed import Ranks  # with torch, which the help of commands does without

    return Ranks()


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """Where an evaluation runs. The encoder is on the device already; threads are for reading and rendering."""

    device: "torch.device"
    num_threads: int = 1
    ranks: "Ranks" = field(default_factory=_alone)  # one, unless the module sets `DISTRIBUTED = True` and was started by torchrun
    # A folder for what it keeps between calls (features, checkpoints of its own), made when first written to. Another folder for each
    # encoder, data and options, the same on every call with them. None: nothing is kept.
    work: Path | None = None
