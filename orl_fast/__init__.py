"""orl-fast: object-level representation learning (ORL, NeurIPS 2021) on scene images, built around data loading."""

from pathlib import Path

from orl_fast.kernel_cache import set_up_kernel_cache

__version__ = "0.1.0"

set_up_kernel_cache(Path(__file__).parent)
