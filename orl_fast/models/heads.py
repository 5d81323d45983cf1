"""Projector and predictor of BYOL: two-layer perceptrons with batch norm between, none at the end."""

from torch import Tensor, nn

from orl_fast.models.backbone import init_kaiming


def projector(num_features: int, *, hidden: int, out: int) -> nn.Sequential:
    """[B, num_features] pooled features → [B, out] (ORL, appendix A): Linear → BN → ReLU → Linear without bias."""
    head = nn.Sequential(nn.Linear(num_features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out, bias=False))
    init_kaiming(head)
    return head


def predictor(dim: int, *, hidden: int) -> nn.Sequential:
    """[B, dim] projections of the online branch → [B, dim]: built like the projector."""
    return projector(dim, hidden=hidden, out=dim)


def pool(features: Tensor) -> Tensor:
    """Global average pool: [B, C, h, w] → [B, C]."""
    return features.mean(dim=(2, 3))
