"""Evaluations of frozen backbones, one module each, found by name in `EVALS`: CONTRIBUTING says what a module defines."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EVALS = {  # modules of this package, a hyphen standing for an underscore, imported when they are used
    "probe": "Linear probe: logistic regression on frozen features.",
    "knn": "Weighted nearest neighbors by cosine similarity.",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """Where an evaluation runs. The encoder is on the device already; threads are for reading and rendering."""

    device: "torch.device"
    num_threads: int = 1
