"""Running an evaluation on a checkpoint, and keeping its values next to the checkpoint."""

import importlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orl_fast.checkpoint import checkpoint_path, read_header
from orl_fast.config import MiningConfig, Section
from orl_fast.console import log
from orl_fast.evals import Context
from orl_fast.models import Encoder, Network, load_encoder

RECORDS = "evals.jsonl"
RANDOM = "random initialization"


def evaluate(
    name: str, checkpoint: Path, data: Path, options: Section, *, context: Context, random_init: bool = False
) -> list[dict[str, Any]]:
    """Run an evaluation, one of `EVALS`, and append its record to evals.jsonl next to the checkpoint.

    Args:
        checkpoint: a file, or the run folder that holds it. random_init: also evaluate the same network untrained.
    Returns:
        For each backbone: "time", "eval", "backbone" (the checkpoint, or "random initialization"), "encoder" (its fingerprint),
        "checkpoint", "method" and "step" (null without training), "data", "options", "values".
    Raises:
        MissingStageError, DataError: see `load_encoder`; and what the evaluation raises.
    """
    run = importlib.import_module(f"orl_fast.evals.{name.replace('-', '_')}").run
    path = checkpoint_path(checkpoint)
    encoder, header = load_encoder(path), read_header(path)
    trained = {"checkpoint": path.name, "method": header["method"], "step": header["step"]}
    backbones = [(str(checkpoint), encoder, trained)]
    if random_init:
        backbones.append((RANDOM, _untrained(header), dict.fromkeys(trained)))
    records = []
    for backbone, encoder, origin in backbones:
        values = run(encoder.to(context.device), data, options, context)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"time": time, "eval": name, "backbone": backbone, "encoder": encoder.fingerprint, **origin, "data": str(data)}
        records.append({**about, "options": options.model_dump(mode="json"), "values": values})
        _append(path.parent / RECORDS, records[-1])
    return records


def _append(file: Path, record: Mapping[str, Any]) -> None:
    """Add one line, in a single write at the end of the file, so that several writers do not mix."""
    try:
        with file.open("ab", buffering=0) as lines:
            lines.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        log.warning("%s: cannot be written (%s); the values are shown but not kept", file, error.strerror)


def _untrained(header: Mapping[str, Any]) -> Encoder:
    """The encoder that the run of a checkpoint started from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(header["config"]["train"]["seed"])
        network = Network.from_description(header["encoder"])
    return Encoder(network, mining=MiningConfig(**header["config"]["mining"]))
