"""How many CPU cores this process may use, and whether others use them."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_GROUPS, _MEMBERSHIP, _STAT = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/stat")


def num_cores() -> int:
    """The cores of this process's CPU affinity, limited to the CPU quota of its container (cgroup v1 or v2), rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *_quotas()])))


class CpuTimes(NamedTuple):
    """Seconds since some moment: of the clock, that the cores of this process were busy (their sum), and busy for this process."""

    wall_s: float
    busy_s: float
    own_s: float


def cpu_times() -> CpuTimes:
    """Now. Where the system does not say how busy its cores are, they count as busy all the time."""
    wall_s, own = time.monotonic(), os.times()
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    ticks = [[int(value) for value in line.split()[1:9]] for line in _read(_STAT).splitlines() if line.split(" ")[0] in names]
    busy_s = sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK") if ticks else wall_s * (os.cpu_count() or 1)
    return CpuTimes(wall_s, busy_s, own.user + own.system)


def _quotas() -> Iterator[float]:
    """The quotas, in cores, of this process's control group and of the groups around it."""
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = _GROUPS / ("cpu" if controllers else "")  # v2, which names no controllers, is mounted at the top
        innermost = mount / group.lstrip("/")  # within a container this path may not exist; the container's own group is the mount
        for folder in (innermost, *innermost.parents):
            limit = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
            with suppress(ValueError):  # "max 100000", or no such files
                quota, period = map(int, limit.split())
                if quota > 0 and period > 0:
                    yield quota / period
            if folder == mount:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
