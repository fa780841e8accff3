"""What is measured: a deployment of its own for each benchmark, started and stopped by the command line as users do.

On "servers" its log, objects and Redis are Apache Kafka, MinIO and Redis, processes beside it. Nothing else differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import psutil

from bench.bundles import install
from infra.embedded.record import running_stack
from infra.embedded.stack import environment
from infra.settings import Settings, load_settings

Kind = Literal["embedded", "servers"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Deployment(NamedTuple):
    """servers: pids by name; the embedded stack has none beside its own processes."""

    kind: Kind
    settings: Settings
    servers: dict[str, int]

    def processes(self) -> dict[str, psutil.Process]:
        """All that run, by name, the supervisor as "stack"."""
        state = running_stack(self.settings)
        pids = {"stack": state.pid} | {c.name: c.pid for c in state.children} if state else {}
        return {name: psutil.Process(pid) for name, pid in (pids | self.servers).items()}


class ServersMissing(Exception):
    """A server can neither be found nor installed here. Says which, and how to get it."""


@contextmanager
def running(kind: Kind, *models: str) -> Iterator[Deployment]:
    """Its dispatcher and a worker are up, with these models."""
    with deployed(kind) as deployment:
        install(deployment.settings, list(models))
        headrace(deployment.settings, "up", "--detach")
        try:
            yield deployment
        finally:
            headrace(deployment.settings, "down")


@contextmanager
def deployed(kind: Kind) -> Iterator[Deployment]:
    """In a fresh data folder, on servers of its own with topics and bucket; nothing of headrace's is up yet.

    Raises ServersMissing.
    """
    with ExitStack() as open_now:
        prefix = "headrace-bench-"
        folder = Path(open_now.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        data = folder / "data"
        data.mkdir()
        if kind == "embedded":
            yield Deployment(kind, load_settings(data_dir=data), {})
            return
        from bench.servers import real_servers  # only here: it imports what tests need

        servers = open_now.enter_context(real_servers())
        settings = load_settings(data_dir=data, **servers.settings(folder))
        headrace(settings, "topics", "apply")
        headrace(settings, "objects", "apply")
        yield Deployment(kind, settings, servers.pids())


def headrace(settings: Settings, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *words],
        env=os.environ | environment(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"headrace {' '.join(words)} ended with {done.returncode}: {done.stderr}"
        )
