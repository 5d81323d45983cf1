"""Running an evaluation on a backbone, and keeping its values next to the checkpoint."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orl_fast.config import MiningConfig, Section, digest
from orl_fast.console import log
from orl_fast.evals import Context
from orl_fast.models import Encoder, Network, OpenEncoder, open_encoder
from orl_fast.models.opening import RANDOM
from orl_fast.places import RUNS_HOME

RECORDS = "evals.jsonl"
UNTRAINED = "random initialization"


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """A backbone to evaluate. `origin`: see `OpenEncoder`."""

    label: str
    encoder: Encoder
    origin: Mapping[str, Any]


def evaluate(
    name: str, checkpoint: str | Path, data: Path, options: Section, *, context: Context, backbone: str | None = None,
    prefix: str | None = None, out: Path | None = None, random_init: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run an evaluation, one of `EVALS`, and append its record to evals.jsonl next to the checkpoint.

    Args:
        checkpoint, backbone, prefix: see `open_encoder`: a run, weights of another toolkit, or "random".
        out: another folder for evals.jsonl and for what the evaluation keeps; by default that of the checkpoint, or runs/random/BACKBONE.
        random_init: also evaluate the same network untrained.
    Returns:
        For each backbone: "time", "eval", "backbone" (the checkpoint, or "random initialization"), "encoder" (its fingerprint),
        "architecture", "checkpoint", "method", "step" and "prefix" (null where there is none), "data", "options", "values".
    Raises:
        MissingStageError, DataError, ConfigError: see `open_encoder`; and what the evaluation raises.
    """
    run = importlib.import_module(f"orl_fast.evals.{name.replace('-', '_')}").run
    backbones, folder = _backbones(str(checkpoint), backbone, prefix, random_init=random_init)
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


def _backbones(checkpoint: str, backbone: str | None, prefix: str | None, *, random_init: bool) -> tuple[list[_Evaluated], Path]:
    """What to evaluate, and the folder of the records."""
    opened = open_encoder(checkpoint, backbone=backbone, prefix=prefix)
    if opened.path is None:
        folder = RUNS_HOME / RANDOM / opened.encoder.name.replace("/", "_")
        return [_Evaluated(label=UNTRAINED, encoder=opened.encoder, origin=opened.origin)], folder
    found = [_Evaluated(label=checkpoint, encoder=opened.encoder, origin=opened.origin)]
    if random_init:
        known, name = opened.header, opened.encoder.name
        untrained = open_encoder(RANDOM, backbone=name) if known is None else OpenEncoder(encoder=_untrained(known))
        found.append(_Evaluated(label=UNTRAINED, encoder=untrained.encoder, origin=untrained.origin))
    return found, opened.path.parent


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
