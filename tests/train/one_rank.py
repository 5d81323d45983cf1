"""The program that one rank of a test runs: trainings one after the other, each with its outcome as a line of JSON."""

import json
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orl_fast.distributed import Ranks, process_group
from orl_fast.errors import OrlFastError
from orl_fast.shards import ShardIndex
from orl_fast.train.loop import train
from orl_fast.train.run import Run, open_mined
from tests.train.conftest import after_step, in_float64, run_config


def _run(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    config = run_config(*job.get("overrides", ()), epochs=job.get("epochs", 2))
    index = ShardIndex.open(Path(job["index"]))
    tables = open_mined(index, Path(job["mined"]), config) if job.get("mined") else None
    run = Run(method="orl" if tables else "byol", config=config, folder=Path(job["folder"]), mined=tables)
    with ExitStack() as stack:
        if job.get("float64"):
            stack.enter_context(in_float64())
        if ranks.rank == job.get("only_rank", 0):
            stack.enter_context(after_step(job.get("stop_at", -1), lambda _: os.kill(os.getpid(), signal.SIGTERM)))
        try:
            outcome = train(run, index=index, ranks=ranks, max_steps=job.get("max_steps"))
        except OrlFastError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return asdict(outcome)


if __name__ == "__main__":
    with process_group("cpu") as group:
        for entry in json.loads(sys.argv[1]):
            print(json.dumps(_run(entry, group)), flush=True)  # noqa: T201
