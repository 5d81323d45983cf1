"""Evaluations of frozen backbones, one module each, found by name in `EVALS`: CONTRIBUTING says what a module defines."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orl_fast.distributed import Ranks

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
    ranks: Ranks = Ranks()  # noqa: RUF009  immutable. One, unless the module sets `DISTRIBUTED = True` and was started by torchrun
    # A folder for what it keeps between calls (features, checkpoints of its own), made when first written to. Another folder for each
    # encoder, data and options, the same on every call with them. None: nothing is kept.
    work: Path | None = None
