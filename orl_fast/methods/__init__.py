"""Pre-training methods, one page each. A new one is a file here, a line in METHODS, a recipe and a test (see CONTRIBUTING)."""

from orl_fast.methods.byol import BYOL
from orl_fast.methods.method import Method
from orl_fast.methods.multicrop_byol import MultiCropBYOL
from orl_fast.methods.orl import ORL

METHODS: dict[str, type[Method]] = {"byol": BYOL, "orl": ORL, "multicrop-byol": MultiCropBYOL}

__all__ = ["BYOL", "METHODS", "ORL", "Method", "MultiCropBYOL"]
