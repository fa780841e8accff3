"""A stack of its own for each benchmark, started and stopped by the command line as users do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.bundles import install
from infra.settings import Settings, load_settings


@contextmanager
def running(*models: str, **environment: str) -> Iterator[Settings]:
    """A fresh data folder with these models, and the stack on it. environment: HEADRACE_ settings."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        settings = load_settings(data_dir=Path(folder, "data"))
        install(settings, list(models))
        headrace(settings, "up", "--detach", **environment)
        try:
            yield settings
        finally:
            headrace(settings, "down")


def headrace(settings: Settings, *words: str, **environment: str) -> None:
    command = [sys.executable, "-m", "headrace", *words, "--data", str(settings.data_dir)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"headrace {' '.join(words)} ended with {done.returncode}: {done.stderr}"
        )
