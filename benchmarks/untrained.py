"""A checkpoint to mine and evaluate with where none was trained: the random weights that a run starts from."""

from pathlib import Path

from orl_fast.checkpoint import write_checkpoint
from orl_fast.config import Config
from orl_fast.models import Mlp, random_encoder
from orl_fast.recipe import config_to_dict


def write_untrained(path: Path, config: Config) -> None:
    """Write the checkpoint of a run of no steps."""
    encoder = random_encoder(config)
    assert isinstance(encoder.projector, Mlp)
    header = {
        "method": "byol", "step": 0, "num_steps": 0, "config": config_to_dict(config), "index": "", "mined": {}, "renderer": "cpu",
        "versions": {}, "encoder": {"backbone": config.model.backbone, "projector": encoder.projector.settings, "prefix": "online."},
    }  # fmt: skip
    write_checkpoint(path, header, model={f"online.{name}": value for name, value in encoder.state_dict().items()}, optimizer={})
