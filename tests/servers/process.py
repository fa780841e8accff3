"""Servers for tests as plain processes: installed once into the cache, on loopback, ended by their pid."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

PATIENCE_S = 60.0

NOT_TESTED = "NOT TESTED against"
"""What the reason of a skip begins with where a server is missing. The run's last lines repeat it."""


def cache_folder(name: str) -> Path:
    """Where a server is installed, outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace" / "servers" / name


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def unavailable(server: str, why: str, remedy: str) -> NoReturn:
    """Skip what needs this server and say so; with CI=true, fail."""
    message = f"{NOT_TESTED} {server}: {why}. To test it: {remedy}."
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Held while a server is installed, so that test runs beside each other do not mix their files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class ServerProcess:
    """A running server with its output in a file. Paused, killed and started again by tests."""

    def __init__(self, command: list[str], folder: Path, ready: Callable[[], bool]) -> None:
        self.command = command
        self.folder = folder
        self._ready = ready
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._running is not None, "the server is not running"
        return self._running.pid

    @property
    def running(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def start(self) -> None:
        with open(self.folder / "output.log", "ab") as output:
            self._running = subprocess.Popen(
                self.command, cwd=self.folder, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._ready():
            if self._running.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = (self.folder / "output.log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.command[0]} did not become ready:\n{tail}")
            time.sleep(0.05)

    def kill(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None


def accepts_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
