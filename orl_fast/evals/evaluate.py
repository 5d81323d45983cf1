"""Running an evaluation on a backbone, and keeping its values next to the checkpoint."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orl_fast.checkpoint import checkpoint_path, read_header
from orl_fast.config import Config, MiningConfig, ModelConfig, Section, digest
from orl_fast.console import log
from orl_fast.errors import ConfigError
from orl_fast.evals import Context
from orl_fast.models import Encoder, Network, load_encoder, random_encoder
from orl_fast.places import RUNS_HOME

RECORDS = "evals.jsonl"
RANDOM = "random"
UNTRAINED = "random initialization"


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """A backbone to evaluate. `origin`: "checkpoint", "method" and "step" of its record."""

    label: str
    encoder: Encoder
    origin: Mapping[str, Any]


def evaluate(
    name: str, checkpoint: str | Path, data: Path, options: Section, *, context: Context, backbone: str | None = None,
    out: Path | None = None, random_init: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run an evaluation, one of `EVALS`, and append its record to evals.jsonl next to the checkpoint.

    Args:
        checkpoint: a file, the run folder that holds it, or "random". backbone: the architecture of "random".
        out: another folder for evals.jsonl and for what the evaluation keeps; by default that of the checkpoint, or runs/random/BACKBONE.
        random_init: also evaluate the same network untrained.
    Returns:
        For each backbone: "time", "eval", "backbone" (the checkpoint, or "random initialization"), "encoder" (its fingerprint),
        "architecture", "checkpoint", "method" and "step" (null without training), "data", "options", "values".
    Raises:
        MissingStageError, DataError: see `load_encoder`; ConfigError: "random" without a backbone; and what the evaluation raises.
    """
    run = importlib.import_module(f"orl_fast.evals.{name.replace('-', '_')}").run
    backbones, folder = _backbones(str(checkpoint), backbone, random_init=random_init)
    folder = out or folder
    records = []
    for each in backbones:
        encoder, chosen = each.encoder.to(context.device), options.model_dump(mode="json")
        identity = digest([encoder.fingerprint, str(data.resolve()), chosen])
        values = run(encoder, data, options, replace(context, work=folder / "evals" / f"{name}-{identity}"))
        time = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"time": time, "eval": name, "backbone": each.label, "encoder": encoder.fingerprint, "architecture": encoder.name}
        records.append({**about, **each.origin, "data": str(data), "options": chosen, "values": values})
        if context.ranks.is_main:
            _append(folder / RECORDS, records[-1])
    return records


def _backbones(checkpoint: str, backbone: str | None, *, random_init: bool) -> tuple[list[_Evaluated], Path]:
    """What to evaluate, and the folder of the records."""
    untrained: dict[str, Any] = {"checkpoint": None, "method": None, "step": None}
    if checkpoint == RANDOM:
        if backbone is None:
            raise ConfigError("a random backbone of which architecture? Name one with --backbone, for example --backbone resnet50")
        encoder = random_encoder(Config(model=ModelConfig(backbone=backbone)))
        return [_Evaluated(label=UNTRAINED, encoder=encoder, origin=untrained)], RUNS_HOME / RANDOM / backbone.replace("/", "_")
    path = checkpoint_path(Path(checkpoint))
    encoder, header = load_encoder(path), read_header(path)
    origin = {"checkpoint": path.name, "method": header["method"], "step": header["step"]}
    found = [_Evaluated(label=checkpoint, encoder=encoder, origin=origin)]
    if random_init:
        found.append(_Evaluated(label=UNTRAINED, encoder=_untrained(header), origin=untrained))
    return found, path.parent


def _append(file: Path, record: Mapping[str, Any]) -> None:
    """Add one line, in a single write at the end of the file, so that several writers do not mix."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as lines:
            lines.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        log.warning("%s: cannot be written (%s); the values are shown but not kept", file, error.strerror)


def _untrained(header: Mapping[str, Any]) -> Encoder:
    """The encoder that the run of a checkpoint started from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(header["config"]["train"]["seed"])
        network = Network.from_description(header["encoder"])
    return Encoder(network.backbone, network.projector, name=network.name, mining=MiningConfig(**header["config"]["mining"]))
