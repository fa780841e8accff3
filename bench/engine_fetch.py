"""A compiled engine out of the object store, over the least that it can take: the transfer of its bytes
and the load of an engine that is on this machine already.

python -m bench.engine_fetch LISTEN_PORT TARGET_PORT: the line between the two, as a process of its own.

MinIO answers through a line of 1 Gbit/s. Each fetch is by a cache that is new, over connections that are
new, as on a machine that has just started.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.figures import Asked, Effort, Figure, spread
from bench.stack import Kind, ServersMissing
from infra.objects import open_objects
from pipelines.engines import EngineCache
from pipelines.engines.signing import Keyring
from pipelines.engines.store import EngineStore

SIZES_BYTES = (5_000_000, 100_000_000)
LINE_BYTES_S = 125_000_000
CHUNK_BYTES = 64 * 1024
SLACK_S = 0.002
"""A line that was asked for late makes up for so much: a process is not woken to the microsecond."""

KEYRING = Keyring({"bench": secrets.token_bytes(32)})


class Fetched(NamedTuple):
    """Seconds of a fetch, and of a load from this disk after it."""

    fetch_s: float
    local_s: float


def measure(effort: Effort, _kind: Kind) -> Iterator[Figure]:
    rounds = 5 if effort == "quick" else 15
    with far_store() as open_store:
        for size_bytes in SIZES_BYTES:
            yield _figure(size_bytes, fetch_all(size_bytes, rounds, open_store))


def _figure(size_bytes: int, samples: list[Fetched]) -> Figure:
    transfer_s = size_bytes / LINE_BYTES_S
    ratios = [fetch_s / (transfer_s + local_s) for fetch_s, local_s in samples]
    fetch_ms, local_ms = (1000 * median(times) for times in zip(*samples, strict=True))
    return Figure(
        name=f"engine cache: fetch of {size_bytes // 1_000_000} MB over its transfer and a local hit",
        measured=median(ratios),
        asked=Asked("<=", 1.1),
        note=f"a line of 1 Gbit/s: {fetch_ms:.1f} ms, of them transfer {1000 * transfer_s:.0f};"
        f" a local hit {local_ms:.2f}; ratios {spread(sorted(ratios))}",
        details={"samples": samples},
    )


def fetch_all(
    size_bytes: int, rounds: int, open_store: Callable[[Path], EngineStore]
) -> list[Fetched]:
    with tempfile.TemporaryDirectory(prefix="hr-fetch-") as folder:
        fetch(1000, Path(folder) / "first", open_store)  # what is imported then, is not measured
        return [
            fetch(size_bytes, Path(folder) / str(number), open_store) for number in range(rounds)
        ]


def fetch(size_bytes: int, folder: Path, open_store: Callable[[Path], EngineStore]) -> Fetched:
    here, there = (
        EngineCache(folder / name, 1 << 34, keyring=KEYRING, store=open_store(folder / "objects"))
        for name in ("here", "there")
    )
    parts: dict[str, object] = {"engine": folder.name, "size_bytes": size_bytes}
    content = secrets.token_bytes(size_bytes)

    def build(into: Path) -> None:
        (into / "weights.bin").write_bytes(content)

    there.get_or_build(parts, build).release()
    fetch_s = timed(lambda: here.get_or_build(parts, never).release())
    return Fetched(fetch_s, timed(lambda: here.get_or_build(parts, never).release()))


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def never(into: Path) -> None:
    raise AssertionError("expected a hit")


@contextmanager
def far_store() -> Iterator[Callable[[Path], EngineStore]]:
    """Opens MinIO at the end of the line, anew each time. Raises ServersMissing."""
    import pytest

    from tests.servers.minio import minio_server

    try:
        with (
            minio_server() as server,
            server.s3.bucket() as bucket,
            line(int(server.s3.host.rpartition(":")[2])) as host,
        ):
            url = server.s3.url(bucket, host)
            yield lambda copies: EngineStore(open_objects(url, server.s3.settings(copies)), KEYRING)
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        raise ServersMissing(str(missing)) from None


@contextmanager
def line(target_port: int) -> Iterator[str]:
    """A process that passes on what the server at this port answers, at the line's rate."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "bench.engine_fetch",
            str(listener.fileno()),
            str(target_port),
        ]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Line:
    """Carries LINE_BYTES_S of answers over all connections together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def serve(self, listener: socket.socket, target_port: int) -> None:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", target_port))
            for source, target, send in ((near, far, far.sendall), (far, near, self._paced(near))):
                for end in (source, target):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(
                    target=self._carry, args=(source, target, send), daemon=True
                ).start()

    def _carry(
        self, source: socket.socket, target: socket.socket, send: Callable[[bytes], None]
    ) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                send(chunk)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _paced(self, target: socket.socket) -> Callable[[bytes], None]:
        def send(chunk: bytes) -> None:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now - SLACK_S) + len(chunk) / LINE_BYTES_S
                free_at = self._free_at
            time.sleep(max(0.0, free_at - now))
            target.sendall(chunk)

        return send


if __name__ == "__main__":
    Line().serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
