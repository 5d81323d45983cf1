"""Pre-training methods, one page each: a module with `loss(views)` and `after_step`; the loop in `orl_fast.train` does the rest."""

from orl_fast.methods.byol import BYOL
from orl_fast.methods.method import Method
from orl_fast.methods.orl import ORL

METHODS: dict[str, type[Method]] = {"byol": BYOL, "orl": ORL}

__all__ = ["BYOL", "METHODS", "ORL", "Method"]
