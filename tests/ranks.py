"""Real processes as the ranks of a gloo group, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_rank(
    arguments: Sequence[str | Path], *, rank: int = 0, world_size: int = 1, port: int = 0, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Python with these arguments, importing this checkout; its output is read with `communicate`."""
    group = {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    env = os.environ | {key: str(value) for key, value in group.items()} | {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_ranks(*arguments: Sequence[str | Path], timeout_s: float = 120) -> list[tuple[int, str]]:
    """One process per rank, each with its own arguments; exit codes and what they printed."""
    port = _free_port()
    processes = [start_rank(each, rank=rank, world_size=len(arguments), port=port) for rank, each in enumerate(arguments)]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
