"""What `bin/gpu-check` runs: the GPU tests and every benchmark, each in a process of its own, gathered in one results file.

A part that fails or runs out of time is recorded as such and does not stop the others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, save_json, versions

BENCHMARKS = ("step", "loader", "neighbors", "mine", "filter", "proposals", "shard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=Path("bench-results/gpu-check.json"))
    parser.add_argument("--photos", type=Path, help="a folder of photographs; without it, pictures are drawn")
    parser.add_argument("--quick", action="store_true", help="smaller inputs and fewer rounds")
    parser.add_argument("--limit-s", type=float, default=900.0, help="the longest that one part may take")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no CUDA GPU here; run it on a machine that has one")
    parts: dict[str, Any] = {}
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA"]
    parts["tests"] = _run(tests, limit_s=arguments.limit_s)
    with tempfile.TemporaryDirectory() as folder:
        for name in BENCHMARKS:
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "orl_fast.cli.main", "bench", name, "--json", str(file)]
            command += [str(arguments.photos)] if arguments.photos else []
            command += ["--quick"] if arguments.quick else []
            part = _run(command, limit_s=arguments.limit_s)
            part["rows"] = json.loads(file.read_text())["rows"] if file.exists() else []
            parts[name] = part
            # Written after every part: a run that is cut off still leaves what it had measured.
            save_json(arguments.results, {"machine": machine(), "versions": versions(), "parts": parts})
    failed = [name for name, part in parts.items() if part["exit_code"] != 0]
    print(f"gpu-check: {arguments.results} written; " + (f"failed: {', '.join(failed)}" if failed else "everything passed"))
    sys.exit(1 if failed else 0)


def _run(command: list[str], *, limit_s: float) -> dict[str, Any]:
    """Run one part, show its output, and keep the end of it."""
    print("gpu-check:", " ".join(command[1:]), flush=True)
    start_s = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False)
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace") + f"\nstopped after {limit_s:.0f} s"
        code = 124
    print(output, flush=True)
    return {"exit_code": code, "seconds": round(time.perf_counter() - start_s, 1), "output_tail": output[-6000:]}


if __name__ == "__main__":
    main()
