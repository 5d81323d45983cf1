"""Networks: backbones, heads, online and target branch, and the trained encoder that mining and evaluations use."""

from orl_fast.models.backbone import Backbone, build_backbone
from orl_fast.models.encoder import Encoder, load_encoder, read_checkpoint
from orl_fast.models.heads import predictor, projector
from orl_fast.models.momentum import Branch, frozen_copy, project, update_target

__all__ = [
    "Backbone", "Branch", "Encoder", "build_backbone", "frozen_copy", "load_encoder", "predictor", "project", "projector",
    "read_checkpoint", "update_target",
]  # fmt: skip
