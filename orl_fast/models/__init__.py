"""Networks: backbones, heads, online and target branch, and the trained encoder that mining and evaluations use."""

from orl_fast.models.backbone import Backbone, build_backbone
from orl_fast.models.encoder import Encoder, load_encoder, read_checkpoint
from orl_fast.models.heads import predictor, projector
from orl_fast.models.momentum import Branch, MomentumEncoder

__all__ = [
    "Backbone",
    "Branch",
    "Encoder",
    "MomentumEncoder",
    "build_backbone",
    "load_encoder",
    "predictor",
    "projector",
    "read_checkpoint",
]
