"""orl-fast: object-level representation learning (ORL, NeurIPS 2021) on scene images, built around data loading."""

__version__ = "0.1.0"
