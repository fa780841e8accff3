"""One Kafka, one MinIO and one Redis to be harmed, and the links by which processes reach them.

As root, each has its data on a small file system of its own, so that a disk can be full.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.servers.kafka import KafkaServer
from tests.servers.minio import MinioServer
from tests.servers.process import ServerProcess, free_port
from tests.servers.proxy import Proxy, proxy_before
from tests.servers.redis import RedisServer

ServerName = Literal["log", "objects", "redis"]
Role = Literal["dispatcher", "worker", "client"]

SERVERS: tuple[ServerName, ...] = ("redis", "objects", "log")

LINKS: tuple[tuple[Role, ServerName], ...] = (
    ("dispatcher", "log"),
    ("dispatcher", "objects"),
    ("dispatcher", "redis"),
    ("worker", "objects"),
    ("worker", "redis"),
    ("client", "log"),
    ("client", "objects"),
)
"""Workers do not speak to the log."""

DISK_BYTES: dict[ServerName, int] = {
    "log": 2 * 1024**3,
    "objects": 4 * 1024**3,
    "redis": 512 * 1024**2,
}


class Kafka(KafkaServer):
    """Has a listener more for each kind of process, which it names to them by the proxy before it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._properties = folder / "server.properties"

    def add_listener(self, name: str, port: int, shown: str) -> None:
        """shown: the address that clients are told. Before it is started."""
        lines = []
        for line in self._properties.read_text().splitlines():
            key = line.partition("=")[0]
            if key == "listeners":
                line += f",{name}://127.0.0.1:{port}"
            elif key == "advertised.listeners":
                line += f",{name}://{shown}"
            elif key == "listener.security.protocol.map":
                line += f",{name}:PLAINTEXT"
            lines.append(line)
        self._properties.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Servers:
    """disks: where each server's data lies; only where these are file systems of their own can they be full."""

    kafka: Kafka
    minio: MinioServer
    redis: RedisServer
    links: dict[tuple[Role, ServerName], Proxy]
    disks: dict[ServerName, Path]
    bucket: str
    redis_folder: Path

    def process(self, name: ServerName) -> ServerProcess:
        processes = {
            "log": self.kafka.process,
            "objects": self.minio.process,
            "redis": self.redis.process,
        }
        return processes[name]

    def kill(self, name: ServerName) -> None:
        self.process(name).kill()

    def restart(self, name: ServerName) -> float:
        """By kill -9. Returns the monotonic time when it was ready again."""
        self.kill(name)
        self.process(name).start()
        return time.monotonic()

    @contextmanager
    def down(self, name: ServerName) -> Iterator[None]:
        self.kill(name)
        try:
            yield
        finally:
            self.process(name).start()

    @contextmanager
    def frozen(self, name: ServerName) -> Iterator[None]:
        """Inside the block it stands still, with its connections open."""
        pid = self.process(name).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def full(self, name: ServerName) -> Iterator[None]:
        """Inside the block its disk takes no more."""
        ballast = self.disks[name] / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(64 * 1024))
            with ballast.open("ab", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(512))
            yield
        finally:
            ballast.unlink(missing_ok=True)

    def heal(self) -> None:
        """All of them run, and nothing is between them and us."""
        for proxy in self.links.values():
            proxy.mode, proxy.delay_s, proxy.resets_per_s = "pass", 0.0, 0.0
            proxy.lose_answer_to = ()
        for disk in self.disks.values():
            (disk / "ballast").unlink(missing_ok=True)
        for server in (self.kafka, self.minio, self.redis):
            if not server.process.running:
                server.process.start()


@contextmanager
def running_servers() -> Iterator[Servers]:
    """Skips, or with CI=true fails, where one of them can neither be found nor installed."""
    with ExitStack() as open_now:
        folder = Path(open_now.enter_context(tempfile.TemporaryDirectory(prefix="hr-servers-")))
        disks: dict[ServerName, Path] = {}
        homes: dict[ServerName, Path] = {}
        for name, size in DISK_BYTES.items():
            homes[name] = folder / name
            data = homes[name] if name == "redis" else homes[name] / "data"
            data.mkdir(parents=True)
            if open_now.enter_context(_disk(data, size)):
                disks[name] = data
        kafka = Kafka(homes["log"])
        minio = MinioServer(homes["objects"])
        redis = RedisServer(homes["redis"], persistent=True)
        links = {}
        for role, server in LINKS:
            target = {"objects": minio.s3.host, "redis": redis.host}.get(server)
            target = target or f"127.0.0.1:{free_port()}"
            proxy = links[role, server] = open_now.enter_context(proxy_before(target))
            if server == "log":
                kafka.add_listener(role.upper(), int(target.rpartition(":")[2]), proxy.host)
        for one in (kafka, minio, redis):
            open_now.callback(one.process.kill)
            one.process.start()
        yield Servers(kafka, minio, redis, links, disks, _bucket(minio), homes["redis"])


def _bucket(minio: MinioServer) -> str:
    from minio import Minio

    name = f"faults-{uuid.uuid4().hex[:12]}"
    s3 = minio.s3
    Minio(s3.host, s3.access_key, s3.secret_key, secure=False).make_bucket(name)
    return name


@contextmanager
def _disk(folder: Path, size_bytes: int) -> Iterator[bool]:
    """A file system on this folder, where we may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
