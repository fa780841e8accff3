"""What the backends on the CPU share: which CPU this is, and how running out of memory shows."""

from __future__ import annotations

import functools
import platform
import sys

_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate")


def cpu_fingerprint() -> dict[str, object]:
    """What of this machine an artefact for its CPU depends on, JSON-able."""
    return {
        "os": platform.system(),
        "architecture": platform.machine(),
        "instruction_set": list(instruction_set()),
    }


@functools.cache
def instruction_set() -> tuple[str, ...]:
    """What this CPU can do, in the words of its operating system, sorted."""
    if sys.platform == "darwin":
        import subprocess  # elsewhere it would only make a cold start longer

        names = ("hw.optional", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        listing = subprocess.run(["sysctl", *names], capture_output=True, text=True, check=False)
        return tuple(sorted(listing.stdout.splitlines()))
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            if line.startswith(("flags", "Features")):
                return tuple(sorted(line.partition(":")[2].split()))
    return ()


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
