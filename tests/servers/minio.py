"""MinIO, one process, built by Go. `HEADRACE_TEST_S3_URL` names a running S3 server instead."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.process import ServerProcess, cache_folder, free_port, only_one, unavailable
from tests.servers.s3 import S3Server, server_of_environment

PACKAGE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
"""What Go calls the last release; its own name for it is not one that Go takes."""
REMEDY = (
    "install Go (https://go.dev/dl; MinIO is then built once, in minutes), put a `minio` on the PATH, or set"
    " HEADRACE_TEST_S3_URL=s3://host:port?secure=false with HEADRACE_S3__ACCESS_KEY and"
    " HEADRACE_S3__SECRET_KEY"
)
BUILD_S = 3600.0


class MinioServer:
    """A server with its data in a folder. Started again, it has what it had."""

    def __init__(self, folder: Path) -> None:
        port, console = free_port(), free_port()
        self.s3 = S3Server(f"127.0.0.1:{port}", secrets.token_hex(8), secrets.token_hex(16))
        environment = {
            "MINIO_ROOT_USER": self.s3.access_key,
            "MINIO_ROOT_PASSWORD": self.s3.secret_key,
            "MINIO_UPDATE": "off",
        }
        addresses = ("--address", self.s3.host, "--console-address", f"127.0.0.1:{console}")
        command = [str(program()), "server", "--quiet", *addresses, str(folder / "data")]
        self.process = ServerProcess(
            ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
            folder,
            self._ready,
        )

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.s3.host}/minio/health/ready", timeout=1):
                return True
        except OSError:
            return False


@contextmanager
def minio_server() -> Iterator[MinioServer]:
    """A server of one's own. Skips where there is neither MinIO nor Go."""
    with tempfile.TemporaryDirectory(prefix="hr-minio-", ignore_cleanup_errors=True) as folder:
        server = MinioServer(Path(folder))
        server.process.start()
        try:
            yield server
        finally:
            server.process.kill()


@contextmanager
def minio_address() -> Iterator[S3Server]:
    """Of the environment, or one that runs inside the block."""
    if given := server_of_environment():
        yield given
        return
    with minio_server() as server:
        yield server.s3


def patience() -> pytest.MarkDecorator:
    """For tests that may have to build it first: the limit on a test's time must not end that."""
    return pytest.mark.timeout(120 if _installed() else BUILD_S)


def _installed() -> Path | None:
    built = cache_folder("bin") / "minio"
    found = shutil.which("minio")
    return built if built.exists() else Path(found) if found else None


def program() -> Path:
    """The server's program, built on first use."""
    if installed := _installed():
        return installed
    if not shutil.which("go"):
        unavailable("MinIO", "there is neither `minio` nor `go` on the PATH", REMEDY)
    with only_one(cache_folder("bin")):
        return _installed() or _build()


def _build() -> Path:
    folder = cache_folder("bin")
    # Next to other work on the machine, and with little memory.
    built = subprocess.run(
        ["nice", "-n", "19", "go", "install", PACKAGE],
        env={**os.environ, "GOBIN": str(folder), "GOFLAGS": "-p=1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if built.returncode != 0:
        unavailable("MinIO", f"Go could not build it ({built.stderr[-500:]})", REMEDY)
    return folder / "minio"
