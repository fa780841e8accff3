"""Wall time of `headrace demo` when everything is cached: all that `make demo` does the second time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from bench.figures import Asked, Effort, Figure
from bench.stack import Kind


def measure(_effort: Effort, _kind: Kind) -> Iterator[Figure]:
    run()
    yield Figure(
        name="second `make demo`",
        measured=run(),
        unit="s",
        asked=Asked("<=", 15),
        note="set-up, models and engines cached; stack started and stopped",
    )


def run() -> float:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "demo"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"headrace demo ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - began
