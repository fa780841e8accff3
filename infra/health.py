"""Whether this process lives and is ready, told over HTTP at `/livez` and `/readyz`. Off unless HEADRACE_HEALTH_PORT
is set.

As a command, `python -m infra.health`, it asks whether the process with that port is ready: exit code 0 or 1. It
imports next to nothing, because containers run it every few seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.settings import Settings

STALLED_AFTER_S = 120.0
"""Longer than a round of any loop while its servers are away: a restart would not bring them back."""

ASK_TIMEOUT_S = 2.0


class Health:
    """What a process says of itself. It sets `ready` when it is ready for work, clears it when it begins to drain."""

    def __init__(
        self,
        stalled_after_s: float = STALLED_AFTER_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ready = False
        self._stalled_after_s = stalled_after_s
        self._monotonic = monotonic
        self._progress_at: float | None = None

    def progress(self) -> None:
        """Called by the main loop each time round."""
        self._progress_at = self._monotonic()

    @property
    def live(self) -> bool:
        """False once the main loop stalls; until it is first run the process is starting, which may take long."""
        began = self._progress_at
        return began is None or self._monotonic() - began <= self._stalled_after_s

    def answer(self, path: str) -> tuple[int, str]:
        """HTTP status and text."""
        if path not in ("/livez", "/readyz"):
            return 404, "not found"
        if not self.live:
            return 503, "stalled"
        return (200, "ok") if self.ready or path == "/livez" else (503, "not ready")


def serve_health(settings: Settings, health: Health) -> None:
    """Answer in a thread of its own, to the end of the process, if a port is set.

    Raises PipelineError (health_port_taken).
    """
    if settings.health_port:
        server = open_server(settings.health_host, settings.health_port, health)
        threading.Thread(target=server.serve_forever, name="health", daemon=True).start()


def open_server(host: str, port: int, health: Health) -> ThreadingHTTPServer:
    """Listens, but does not answer before it is run. port: 0 for any."""

    class Handler(BaseHTTPRequestHandler):
        timeout = ASK_TIMEOUT_S

        def do_GET(self) -> None:
            status, text = health.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """A line for each probe would be most of the log."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        from schemas.errors import PipelineError

        raise PipelineError(
            "health_port_taken",
            f"Health: expected to listen at {host}:{port}, came {error}; set HEADRACE_HEALTH_PORT to a free port.",
        ) from error


def is_ready(environment: Mapping[str, str]) -> bool:
    """Whether the process with these variables says that it is ready."""
    host = environment.get("HEADRACE_HEALTH_HOST", "127.0.0.1")
    # One that listens everywhere is asked on loopback.
    host = "127.0.0.1" if host == "0.0.0.0" else host
    connection = HTTPConnection(host, int(environment["HEADRACE_HEALTH_PORT"]), ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if is_ready(os.environ) else 1)
