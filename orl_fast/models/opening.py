"""A backbone from wherever it is: a run, a checkpoint, a file of another toolkit, or random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orl_fast.checkpoint import checkpoint_path, is_checkpoint, read_header
from orl_fast.config import Config, MiningConfig, ModelConfig
from orl_fast.errors import ConfigError, MissingStageError
from orl_fast.models.encoder import Encoder, load_encoder, random_encoder
from orl_fast.models.foreign import load_foreign

RANDOM = "random"


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenEncoder:
    """An encoder on the CPU, and where it comes from."""

    encoder: Encoder
    path: Path | None = None  # the file; None: random weights
    prefix: str | None = None  # of its names in the file, where they were looked for
    header: Mapping[str, Any] | None = None  # of a checkpoint of orl-fast

    @property
    def origin(self) -> dict[str, Any]:
        """For records: "checkpoint" (the file's name), "method", "step", "prefix", null where there is none."""
        header = self.header or {}
        name = None if self.path is None else self.path.name
        return {"checkpoint": name, "method": header.get("method"), "step": header.get("step"), "prefix": self.prefix}


def open_encoder(checkpoint: str | Path, *, backbone: str | None = None, prefix: str | None = None) -> OpenEncoder:
    """Open `checkpoint`: a checkpoint of orl-fast, the run folder that holds it, a file of another toolkit, or "random".

    Args:
        backbone: the architecture, as `build_backbone` names it; "random" needs it, and files that do not state it.
        prefix: of the backbone's names in a file of another toolkit, or of another network than the one that a checkpoint of orl-fast is
            about ("target"); see `load_foreign`.
    Raises:
        MissingStageError: there is no such file. DataError: see `load_encoder` and `load_foreign`. ConfigError: an architecture is missing,
            unknown or another one than the checkpoint's; or the file has no such prefix, or several backbones.
    """
    if str(checkpoint) == RANDOM:
        if backbone is None:
            raise ConfigError("a random backbone of which architecture? Name one with --backbone, for example --backbone resnet50")
        if prefix is not None:
            raise ConfigError("a random backbone has no --prefix; leave it out")
        return OpenEncoder(encoder=random_encoder(Config(model=ModelConfig(backbone=backbone))))
    path = checkpoint_path(Path(checkpoint))
    if not path.is_file():
        raise MissingStageError(f"{path}: there is no such file; give a run of orl-fast train, weights of another toolkit, or {RANDOM!r}")
    if not is_checkpoint(path):
        found = load_foreign(path, backbone=backbone, prefix=prefix)
        return OpenEncoder(encoder=found.encoder, path=path, prefix=found.prefix)
    header = read_header(path)
    name = header["encoder"]["backbone"]
    if backbone not in (None, name):
        raise ConfigError(f"{path}: its backbone is {name}, not {backbone}; leave --backbone out")
    if prefix is None:
        return OpenEncoder(encoder=load_encoder(path), path=path, header=header)
    found = load_foreign(path, backbone=name, prefix=prefix)
    encoder = Encoder(found.encoder.backbone, None, name=name, mining=MiningConfig(**header["config"]["mining"]))
    return OpenEncoder(encoder=encoder, path=path, prefix=found.prefix, header=header)
