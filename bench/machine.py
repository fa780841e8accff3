"""The machine it ran on, and what its processes took: CPU time and memory."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from infra.embedded.redis_server import find_server

PACKAGES = ("onnxruntime", "numpy", "pillow", "tokenizers", "celery", "redis", "msgspec")


def describe() -> dict[str, str]:
    """Hardware and versions, for whoever compares figures."""
    server = find_server()
    return {
        "cpu": f"{_cpu_model()}, {cores()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(
            [f"{name} {version(name)}" for name in PACKAGES] + [f"{server.name} {server.version}"]
        ),
    }


def cores() -> int:
    """CPUs this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(os, "sched_getaffinity") else _count()


def _count() -> int:
    return os.cpu_count() or 1


def cpu_s(process: psutil.Process) -> float:
    """CPU time of all its threads: our own exactly, of others as the system counts, in hundredths of a second."""
    if process.pid == os.getpid():
        return time.process_time()
    times = process.cpu_times()
    return float(times.user + times.system)


class CpuMeter:
    """CPU seconds by process from `start` on; also of all else that ran on the machine."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._before = self._read()
        self._busy = _busy_s()
        self._began = time.perf_counter()

    def read(self) -> dict[str, float]:
        return {name: now - self._before[name] for name, now in self._read().items()}

    def others_cpus(self) -> float:
        """How many CPUs, on average, were busy with processes that are not ours."""
        ours = sum(self.read().values())
        return max(0.0, _busy_s() - self._busy - ours) / (time.perf_counter() - self._began)

    def _read(self) -> dict[str, float]:
        return {name: cpu_s(process) for name, process in self._processes.items()}


def rss_bytes(processes: dict[str, psutil.Process]) -> dict[str, int]:
    return {name: int(process.memory_info().rss) for name, process in processes.items()}


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
