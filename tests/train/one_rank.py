"""The program that one rank of a test runs: trainings one after the other, each with its outcome as a line of JSON."""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from orl_fast.distributed import process_group
from orl_fast.errors import OrlFastError
from orl_fast.shards import ShardIndex
from orl_fast.train import Ranks, train
from orl_fast.train.mined import open_mined
from orl_fast.train.step import TrainStep
from tests.train.conftest import run_config

_step = TrainStep.__call__
_init = TrainStep.__init__


def _run(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    config = run_config(*job.get("overrides", ()), epochs=job.get("epochs", 2))
    index = ShardIndex.open(Path(job["index"]))
    tables = open_mined(index, Path(job["mined"]), config) if job.get("mined") else None

    def init(self: TrainStep, *arguments: Any, **options: Any) -> None:
        _init(self, *arguments, **options)
        if job.get("other_weights"):
            with torch.no_grad():
                next(self.method.parameters()).add_(1e-3)

    def step(self: TrainStep, *arguments: Any, **options: Any) -> dict[str, float]:
        logged = _step(self, *arguments, **options)
        if options["step"] == job.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        return logged

    TrainStep.__init__, TrainStep.__call__ = init, step  # type: ignore[method-assign]
    try:
        outcome = train(
            "orl" if tables else "byol", config, index=index, folder=Path(job["folder"]), mined=tables, ranks=ranks,
            max_steps=job.get("max_steps"),
        )  # fmt: skip
    except OrlFastError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return asdict(outcome)


if __name__ == "__main__":
    with process_group("cpu") as group:
        for entry in json.loads(sys.argv[1]):
            print(json.dumps(_run(entry, group)), flush=True)  # noqa: T201
