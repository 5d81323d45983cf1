"""Evaluations of frozen backbones, one module each, found by name in `EVALS`. A module defines

its docstring   the help of `orl-fast eval NAME`, continued by that of its Options
Options         a Section; each field is an option of the command, checked as declared: `cost` is --cost, `num_neighbors` --neighbors,
                `size_px` --size. Types: int, float, str, bool, Path, a Literal; or one of these or None. An option named
                `annotations` takes the place of DATA
SCORES          name → heading of the values that are shares, 0 to 1, shown in the table
run             (encoder, data, options, context) → values by name, which are appended to the run's evals.jsonl
summary         optional: values → a line below the table; by default the other values
"""

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
