"""What a stranger waits for: from `git clone` to the demo's results, a second demo, and the tests.

    python -m bench.fresh_clone [--no-tests]

Clones HEAD into a temporary folder. Only pip's cache is warm: nothing of headrace's own is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Asked, Figure
from bench.machine import describe
from bench.report import show

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-clone-") as folder:
        figures = list(measure(Path(folder), tests=not options.no_tests))
    show(figures, describe())
    return 0


def measure(folder: Path, *, tests: bool) -> Iterator[Figure]:
    clone = folder / "headrace"
    environment = _environment(folder)
    cloned = run(("git", "clone", "--quiet", str(CHECKOUT), str(clone)), folder, environment)
    demo = run(("make", "demo"), clone, environment)
    yield _figure("clone to the demo's results, warm package cache", cloned + demo, 180)
    yield _figure("second `make demo`", run(("make", "demo"), clone, environment), 15)
    if tests:
        yield _figure("`make test`", run(("make", "test"), clone, environment), 600)


def run(command: tuple[str, ...], folder: Path, environment: dict[str, str]) -> float:
    """Seconds it took. Raises RuntimeError with the end of its output if it failed."""
    print(f"{' '.join(command[:2])} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"[-8000:]
        )
    return time.perf_counter() - began


def _environment(folder: Path) -> dict[str, str]:
    """Ours without what points into our checkout, and with caches of headrace that are empty."""
    cache = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
    )
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("HEADRACE_")
    }
    return ours | {
        "PIP_CACHE_DIR": cache.stdout.strip(),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XDG_DATA_HOME": str(folder / "data"),
    }


def _figure(name: str, seconds: float, most_s: float) -> Figure:
    return Figure(name=name, measured=seconds, unit="s", asked=Asked("<=", most_s))


if __name__ == "__main__":
    raise SystemExit(main())
