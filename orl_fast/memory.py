"""How much memory this process may still fill, file caches included."""

import os
from contextlib import suppress
from pathlib import Path

_GROUPS, _MEMBERSHIP, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that programs or file caches can take without pushing out a program: of the machine, or of a smaller control group."""
    return max(0, min(_of_machine(), _of_groups()))


def _of_machine() -> int:
    with suppress(OSError, ValueError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_groups() -> int:
    """The tightest limit of this process's control group and of those around it (cgroup v2 or v1), less what is in use for good."""
    found = 1 << 62
    with suppress(OSError, ValueError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = _GROUPS / ("memory" if controllers else "")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            innermost = mount / group.lstrip("/")  # within a container this path may not exist; the container's own group is the mount
            for folder in (innermost, *(parent for parent in innermost.parents if parent.is_relative_to(mount))):
                with suppress(OSError, ValueError):  # "max", or no such file
                    limit, used = (int((folder / name).read_text()) for name in names)
                    found = min(found, limit - used + _file_cache(folder))
    return found


def _file_cache(folder: Path) -> int:
    """Bytes of a group's file cache, which give way."""
    values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(values["active_file"]) + int(values["inactive_file"])
