"""What this process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


def available_cpus(cgroup_cpu: Path = CGROUP_CPU) -> int:
    """CPUs this process may run on: its affinity, or its cgroup's share if that is less; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = cgroup_cpu.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count
