"""What `headrace doctor` looks at on this machine: interpreter, folders, clock, limits, the embedded stack's parts."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
import uuid
from pathlib import Path

from infra.catalogue import Catalogue
from infra.checks import SKEW_NOTED_S, Finding, Level
from infra.embedded.redis_server import find_server
from infra.eventlog.open import connect_log
from infra.objects import ObjectExists, connect_objects
from infra.settings import SOCKET_PATH_LIMIT, Settings
from schemas.topics import JOB_TOPICS, RETRY

LEAST_FREE_BYTES = 200 * 1024**2
LOW_FREE_BYTES = 2 * 1024**3
LEAST_OPEN_FILES = 1024


def python(_settings: Settings) -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        return Finding("python", "fail", found, "Run it on Linux or macOS; on Windows in WSL2.")
    return Finding("python", "ok", found)


def data_folder(settings: Settings) -> Finding:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=settings.data_dir):
        free = shutil.disk_usage(settings.data_dir).free
    found = f"{settings.data_dir} is writable, {free / 1e9:.1f} GB free"
    if free < LOW_FREE_BYTES:
        level: Level = "fail" if free < LEAST_FREE_BYTES else "warn"
        remedy = "Free disk space, or choose another folder with --data."
        return Finding("data folder", level, found, remedy)
    return Finding("data folder", "ok", found)


def clock(settings: Settings) -> Finding:
    with tempfile.NamedTemporaryFile(dir=settings.data_dir) as file:
        skew_s = os.fstat(file.fileno()).st_mtime - time.time()
    found = f"{abs(skew_s) * 1000:.0f} ms from the data folder's clock"
    if abs(skew_s) > SKEW_NOTED_S:
        remedy = "Synchronise both clocks: retention and deadlines need it."
        return Finding("clock", "warn", found, remedy)
    return Finding("clock", "ok", found)


def open_files(_settings: Settings) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} files"
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        return Finding(
            "open files", "warn", found, "Raise it before `headrace up`: ulimit -n 4096."
        )
    return Finding("open files", "ok", found)


def sqlite(settings: Settings) -> Finding:
    with tempfile.TemporaryDirectory(dir=settings.data_dir) as folder:
        connection = sqlite3.connect(Path(folder) / "probe.db")
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute("CREATE TABLE probe(x)")
        finally:
            connection.close()
    found = f"SQLite {sqlite3.sqlite_version}, journal mode {mode}"
    if mode != "wal":
        return Finding("sqlite", "fail", found, "Put the data folder on a local disk.")
    return Finding("sqlite", "ok", found)


def event_log(settings: Settings) -> Finding:
    log = connect_log(settings)
    try:
        lag = log.lag("dispatcher", [*JOB_TOPICS, RETRY])
    finally:
        log.close()
    return Finding("event log", "ok", f"reachable, {sum(t.open for t in lag.values())} jobs open")


def redis_server(_settings: Settings) -> Finding:
    server = find_server()
    return Finding("redis server", "ok", f"{server.name} {server.version} at {server.path}")


def redis_socket(settings: Settings) -> Finding:
    length = len(bytes(settings.redis_socket))
    found = f"{settings.redis_socket} ({length} bytes)"
    if length > SOCKET_PATH_LIMIT:
        remedy = f"Set TMPDIR so that it has {SOCKET_PATH_LIMIT} at most."
        return Finding("redis socket", "fail", found, remedy)
    return Finding("redis socket", "ok", found)


def object_folder(settings: Settings) -> Finding:
    objects = connect_objects(settings)
    key = f"doctor/{uuid.uuid4().hex}"
    objects.put(key, b"first")
    try:
        objects.put(key, b"second", if_absent=True)
    except ObjectExists:
        return Finding("object store", "ok", "writable, conditional writes are enforced")
    finally:
        objects.delete(key)
    return Finding(
        "object store", "fail", "ignores conditional writes", "Put it on a local file system."
    )


def models(settings: Settings) -> Finding:
    cards = Catalogue(connect_objects(settings)).cards()
    if not cards:
        return Finding(
            "models", "warn", "none installed", "`headrace models add DIR` installs one."
        )
    names = sorted({card.name for card in cards})
    return Finding("models", "ok", f"{len(cards)} installed: {', '.join(names)}")


def engine_cache(settings: Settings) -> Finding:
    settings.engines.cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=settings.engines.cache_dir):
        return Finding("engine cache", "ok", f"{settings.engines.cache_dir} is writable")


def engine_keys(settings: Settings) -> list[Finding]:
    """Raises PipelineError for keys that are not as they should be. Without an object store that machines
    share, none are needed."""
    if keys := settings.engines.secrets():
        found = f"engines are signed with {next(iter(keys))!r}, and shared"
        return [Finding("engine keys", "ok", found)]
    if not settings.objects_address.startswith("s3:"):
        return []
    found = "none, so engines are not shared: each machine builds its own"
    remedy = "Set HEADRACE_ENGINES__KEYS_FILE to the same secret on all of them."
    return [Finding("engine keys", "warn", found, remedy)]
