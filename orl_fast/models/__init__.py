"""Networks: backbones, heads, a method's network and its moving average, and the trained encoder that mining and evaluations use."""

from orl_fast.models.backbone import Backbone, build_backbone
from orl_fast.models.encoder import Encoder, load_encoder, random_encoder
from orl_fast.models.heads import Mlp
from orl_fast.models.network import Network, ema_momentum, frozen_copy, project, update_target
from orl_fast.models.opening import OpenEncoder, open_encoder

__all__ = [
    "Backbone", "Encoder", "Mlp", "Network", "OpenEncoder", "build_backbone", "ema_momentum", "frozen_copy", "load_encoder", "open_encoder",
    "project", "random_encoder", "update_target",
]  # fmt: skip
