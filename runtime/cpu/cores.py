"""The processor cores that this process may use: its affinity, and the quota of its control group.

Containers and batch systems often limit a process to a few of a machine's cores. `os.cpu_count` counts them all, and OpenMP
does not know the quota. Threads beyond it only stop each other: the kernel suspends all of them until the next period.
Source: the kernel's documentation of cpu.max (cgroup v2) and of cpu.cfs_quota_us (v1).
"""

import os
from pathlib import Path

__all__ = ["cpu_quota", "usable_cores"]


def usable_cores() -> int:
    """The number of cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest quota of this process's control groups, in cores; None if there is none."""
    quotas = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in {controllers, "cpu"} if controllers else {"", "unified"}:
            base = root / "sys/fs/cgroup" / mount
            inner = base / group.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder == base.parent:
                    break
                quotas += [quota for quota in (_quota(folder),) if quota is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    words = " ".join(_lines(folder / "cpu.max")).split()
    words = words or [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    try:
        quota, period = map(float, words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
