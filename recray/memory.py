"""How much memory this process may still use."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory() -> int:
    """Bytes that this process could still use: free ones and caches, within its control group's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        if controllers in ("", "memory"):
            root = f"/sys/fs/cgroup/{controllers}"
            # inside a container the group's path is that of the host, and the group itself the root
            for group in (f"{root}/{path.strip('/')}", root):
                free = min(free, _left(group))
    return max(1, free)


def _left(group: str) -> int:
    """Bytes up to the limit of a control group, caches that can be dropped not counted as used."""
    names = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]
    for limit, used in names:
        words = [*_lines(f"{group}/{limit}"), *_lines(f"{group}/{used}")]
        if len(words) == 2 and words[0].strip().isdigit():
            stat = dict(line.split() for line in _lines(f"{group}/memory.stat"))
            dropped = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return int(words[0]) - int(words[1]) + dropped
    return 1 << 62


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
