"""`headrace doctor`: is this machine fit, are the settings sound, and what to do where not."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import typer
from msgspec import Struct
from rich.markup import escape
from rich.table import Table

from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import FAILED, handle_errors, output, print_json
from infra.catalogue import Catalogue
from infra.embedded.record import running_stack
from infra.embedded.redis_server import find_server
from infra.eventlog.open import connect_log
from infra.objects import ObjectExists, connect_objects
from infra.redis_client import connect_redis, redis_errors
from infra.settings import SOCKET_PATH_LIMIT, Settings
from schemas.errors import PipelineError, Transient
from schemas.topics import JOB_TOPICS, RETRY, TOPIC_BY_NAME

LEAST_FREE_BYTES = 200 * 1024**2
LOW_FREE_BYTES = 2 * 1024**3
LEAST_OPEN_FILES = 1024
CLOCK_TOLERANCE_S = 2.0


class Finding(NamedTuple):
    """What a check found. remedy: what to do about it; empty if all is well."""

    level: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


class Checked(Struct, frozen=True):
    """One line of the report."""

    check: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str


Check = Callable[[Settings], Finding]


@handle_errors
def doctor(data: Data = None, json: Json = False) -> None:
    """Check this machine and the settings.

    Says what to do where something is not well. Exit code 1: something will not work.
    """
    results = examine(settings_for(data))
    if json:
        print_json(results)
    else:
        output.print(_table(results))
    if any(result.level == "fail" for result in results):
        raise typer.Exit(FAILED)


def examine(settings: Settings) -> list[Checked]:
    """Run every check; one that cannot be carried out has failed."""
    return [Checked(name, *_tried(check, settings)) for name, check in CHECKS.items()]


def _tried(check: Check, settings: Settings) -> Finding:
    try:
        return check(settings)
    except PipelineError as error:
        return Finding("fail", error.message)
    except OSError as error:
        return Finding("fail", str(error), "Make the folder accessible, or choose another.")


def python(_settings: Settings) -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        return Finding("fail", found, "Run it on Linux or macOS; on Windows in WSL2.")
    return Finding("ok", found)


def data_folder(settings: Settings) -> Finding:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=settings.data_dir):
        free = shutil.disk_usage(settings.data_dir).free
    found = f"{settings.data_dir} is writable, {free / 1e9:.1f} GB free"
    if free < LOW_FREE_BYTES:
        level: Literal["warn", "fail"] = "fail" if free < LEAST_FREE_BYTES else "warn"
        return Finding(level, found, "Free disk space, or choose another folder with --data.")
    return Finding("ok", found)


def redis_server(settings: Settings) -> Finding:
    if settings.redis_url.get_secret_value():
        return Finding("ok", "not ours: HEADRACE_REDIS_URL is set")
    server = find_server()
    return Finding("ok", f"{server.name} {server.version} at {server.path}")


def redis_socket(settings: Settings) -> Finding:
    length = len(bytes(settings.redis_socket))
    found = f"{settings.redis_socket} ({length} bytes)"
    if length > SOCKET_PATH_LIMIT:
        return Finding("fail", found, f"Set TMPDIR so that it has {SOCKET_PATH_LIMIT} at most.")
    return Finding("ok", found)


def redis_eviction(settings: Settings) -> Finding:
    client = connect_redis(settings)
    try:
        with redis_errors():
            policy = client.config_get("maxmemory-policy")["maxmemory-policy"]
    except Transient as error:
        if running_stack(settings) or settings.redis_url.get_secret_value():
            return Finding("fail", error.message, "See `headrace status` and the log of redis.")
        return Finding("ok", "not running; ours never evicts")
    finally:
        client.close()
    if policy != "noeviction":
        return Finding(
            "fail", f"maxmemory-policy is {policy}", "Set it to noeviction: it holds queues."
        )
    return Finding("ok", "maxmemory-policy is noeviction")


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
        return Finding("fail", found, "Put the data folder on a local disk.")
    return Finding("ok", found)


def event_log(settings: Settings) -> Finding:
    log = connect_log(settings)
    try:
        lag = log.lag("dispatcher", [*JOB_TOPICS, RETRY])
    finally:
        log.close()
    return Finding("ok", f"reachable, {sum(topic.open for topic in lag.values())} jobs open")


def retention(settings: Settings) -> Finding:
    deadline_s = settings.dispatcher.max_deadline_s
    kept_s = min(TOPIC_BY_NAME[name].retention_s for name in (*JOB_TOPICS, RETRY))
    found = f"jobs are kept {kept_s / 86400:g} days, deadlines reach {deadline_s / 86400:g} days"
    if kept_s < deadline_s:
        return Finding(
            "fail", found, f"Set HEADRACE_DISPATCHER__MAX_DEADLINE_S to {kept_s:.0f} at most."
        )
    return Finding("ok", found)


def object_store(settings: Settings) -> Finding:
    objects = connect_objects(settings)
    key = f"doctor/{uuid.uuid4().hex}"
    objects.put(key, b"first")
    try:
        objects.put(key, b"second", if_absent=True)
    except ObjectExists:
        return Finding("ok", "writable, conditional writes are enforced")
    finally:
        objects.delete(key)
    return Finding("fail", "ignores conditional writes", "Use a store that honours If-None-Match.")


def models(settings: Settings) -> Finding:
    cards = Catalogue(connect_objects(settings)).cards()
    if not cards:
        return Finding("warn", "none installed", "`headrace models add DIR` installs one.")
    names = sorted({card.name for card in cards})
    return Finding("ok", f"{len(cards)} installed: {', '.join(names)}")


def engine_cache(settings: Settings) -> Finding:
    settings.engine_cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=settings.engine_cache_dir):
        return Finding("ok", f"{settings.engine_cache_dir} is writable")


def open_files(_settings: Settings) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} files"
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        return Finding("warn", found, "Raise it before `headrace up`: ulimit -n 4096.")
    return Finding("ok", found)


def clock(settings: Settings) -> Finding:
    with tempfile.NamedTemporaryFile(dir=settings.data_dir) as file:
        skew_s = os.fstat(file.fileno()).st_mtime - time.time()
    found = f"{abs(skew_s) * 1000:.0f} ms from the data folder's clock"
    if abs(skew_s) > CLOCK_TOLERANCE_S:
        return Finding("warn", found, "Synchronise both clocks: retention and deadlines need it.")
    return Finding("ok", found)


CHECKS: dict[str, Check] = {
    "python": python,
    "data folder": data_folder,
    "clock": clock,
    "open files": open_files,
    "sqlite": sqlite,
    "event log": event_log,
    "retention": retention,
    "redis server": redis_server,
    "redis socket": redis_socket,
    "redis eviction": redis_eviction,
    "object store": object_store,
    "models": models,
    "engine cache": engine_cache,
}


def _table(results: list[Checked]) -> Table:
    table = Table(box=None, header_style="dim")
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for result in results:
        found = f"{result.detail}\n{result.remedy}" if result.remedy else result.detail
        level = f"[{colours[result.level]}]{result.level}[/]"
        table.add_row(result.check, level, escape(found))
    return table
