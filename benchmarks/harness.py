"""How every benchmark here measures: ours and the baseline in one process, in turn, as ratios with their spread.

Machines are shared and drift, so no figure stands without its ratio. Each round runs every contender once, in an order that alternates; a
contender's ratio is taken within the round (its rate over the baseline's of the same round), and the median and interquartile range of
those ratios are reported. Rates are higher-is-better ("images/s", "boxes/s").
"""

import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a result.

    Attributes:
        name: what was measured. unit: of `median`, higher is better ("images/s").
        median: rate. iqr: interquartile range of the rate. ratio: median of the per-round ratios to the baseline (the baseline itself: 1).
        ratio_iqr: spread of those ratios. group: rows that share a baseline.
    """

    name: str
    unit: str
    median: float
    iqr: float
    ratio: float
    ratio_iqr: float = 0.0
    group: str = ""


Columns = Mapping[str, Callable[[Any], str]]  # heading, and what the cell of a row shows


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time: `run()` does the work once and returns how many units it did."""

    name: str
    run: Callable[[], float]


def compare(
    contenders: Sequence[Contender],
    *,
    unit: str,
    rounds: int,
    group: str = "",
    warmup: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time the contenders in turn; the first is the baseline.

    Args:
        rounds: how often each runs (after one run that is not counted, which pays for compilation and caches).
        clock: `time.process_time` where all work is this process's own on one core, so that others on the core do not count.
    """
    if warmup:
        for contender in contenders:
            contender.run()
    rates = np.zeros((len(contenders), rounds))
    for round_ in range(rounds):
        order = range(len(contenders)) if round_ % 2 == 0 else range(len(contenders) - 1, -1, -1)
        for i in order:
            start_s = clock()
            units = contenders[i].run()
            rates[i, round_] = units / (clock() - start_s)
    ratios = rates / rates[0]
    return [
        Row(
            name=contender.name,
            unit=unit,
            median=float(np.median(rates[i])),
            iqr=iqr(rates[i]),
            ratio=float(np.median(ratios[i])),
            ratio_iqr=iqr(ratios[i]),
            group=group,
        )
        for i, contender in enumerate(contenders)
    ]


@cache
def available(module: str, *, needed_by: str, remedy: str) -> bool:
    """Whether an optional package can be imported; if not, one line says which contenders are skipped, and what installs it."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a package that is there may still fail to load its libraries
        reason = str(error).partition("\n")[0]
        print(f"skipped: {needed_by}: the package {module.partition('.')[0]} cannot be imported ({reason}); {remedy}")
        return False
    return True


def iqr(values: np.ndarray[Any, Any]) -> float:
    """The interquartile range."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def machine() -> dict[str, Any]:
    """The processor, cores, memory and GPU of this machine."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory_gb), "gpu": gpu, "system": platform.platform()}


def versions() -> dict[str, str]:
    """The versions that shape the figures."""
    names = (
        "torch",
        "torchvision",
        "nvidia-dali-cuda130",
        "numba",
        "opencv-contrib-python-headless",
        "faiss-gpu",
        "faiss-cpu",
        "webdataset",
        "spdl",
        "torchcodec",
        "lightly",
        "pillow",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def result(title: str, rows: Sequence[Row], *, note: str = "") -> dict[str, Any]:
    """The JSON form: {"benchmark", "machine", "versions", "rows"}, and "note" where there is one."""
    found = {"benchmark": title, "machine": machine(), "versions": versions(), "rows": [asdict(row) for row in rows]}
    return found | ({"note": note} if note else {})


def save_json(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def save_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Horizontal bars of the ratios, one panel for each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(row.group for row in rows))
    sizes = [sum(row.group == group for row in rows) for group in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 1.0 + 0.38 * sum(sizes) + 0.5 * len(groups)), squeeze=False, gridspec_kw={"height_ratios": sizes}
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        members = [row for row in rows if row.group == group][::-1]
        colors = ["#9aa5b1" if row.ratio == 1 and row.ratio_iqr == 0 else "#1f77b4" for row in members]
        bars = axis.barh(
            [row.name for row in members], [row.ratio for row in members], xerr=[row.ratio_iqr / 2 for row in members], color=colors
        )
        axis.bar_label(bars, [f" {row.ratio:.2f}× ({row.median:,.4g} {row.unit})" for row in members], fontsize=8)
        axis.set_title(group or title, fontsize=10, loc="left")
        axis.margins(x=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvline(1, color="#9aa5b1", linewidth=0.8)
    axes[-1, 0].set_xlabel("speed relative to the baseline (grey); higher is better")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(name: str, source: Path | None, json_path: Path, *, quick: bool) -> None:
    """Run bench_NAME; print its table and its NOTE, write JSON and, where matplotlib is installed, a picture next to it."""
    title = f"orl-fast bench {name}" + (" --quick" if quick else "")
    module = importlib.import_module(f"benchmarks.bench_{name}")
    rows: list[Row] = module.run(source, quick=quick)
    columns: Columns = {
        "rate (median)": lambda row: f"{row.median:,.4g} {row.unit}",
        "spread (IQR)": lambda row: f"{row.iqr:,.3g}",
        "ratio": lambda row: f"{row.ratio:.2f}× ± {row.ratio_iqr / 2:.2f}",
    }
    publish(title, rows, json_path, columns=columns, note=getattr(module, "NOTE", ""))


def publish(title: str, rows: Sequence[Row], json_path: Path, *, columns: Columns, note: str) -> None:
    """Print a table of these columns (by heading, what it shows of a row), write JSON and, where possible, a picture."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *columns, title=title, title_justify="left", caption=note, caption_justify="left")
    group = None
    for row in rows:
        if row.group and row.group != group:
            table.add_section()
            table.add_row(f"[bold]{row.group}")
        group = row.group
        table.add_row(row.name, *(show(row) for show in columns.values()))
    screen = Console()
    Console(width=max(screen.width, 110)).print(table)  # what is piped into a file need not be narrow
    save_json(json_path, result(title, rows, note=note))
    picture = json_path.with_suffix(".png")
    try:
        save_plot(picture, title, rows)
    except ImportError:
        print(f"written: {json_path} (no picture: pip install 'orl-fast[bench]' brings matplotlib)")
    else:
        print(f"written: {json_path}, {picture}")
