"""Servers that die, freeze, forget, or have no room left."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tests.faults.real.keeper import until
from tests.faults.real.servers import ServerName, Servers
from tests.faults.real.stack import LEASE_S
from tests.faults.real.suite import STUCK_S, Run, Scale, fault

REDIS_BACK_S = 5.0
"""Within which work resumes once Redis is there again."""


def _no_small_disks(servers: Servers) -> str:
    return "" if servers.disks else "mounting a small file system takes root"


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────


@fault(4, "Redis killed", long=Scale(20, 6_000), short=Scale(2, 500), limit_s=REDIS_BACK_S)
def redis_killed(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            run.pause(1)
            run.recovered(run.servers.restart("redis"))


@fault(5, "Redis loses all it has", long=Scale(20, 8_000), short=Scale(2, 500), limit_s=LEASE_S + 5)
def redis_flushed(run: Run) -> None:
    with run.load() as load:
        for _ in range(run.scale.repeats):
            run.pause(2)
            until(load.in_hand, STUCK_S, "a job in hand")
            run.stack.redis.flushall()
            run.answered(load.in_hand(), time.monotonic())


@fault(6, "Redis frozen", long=Scale(10, 15_000, 15), short=Scale(1, 500, 4), limit_s=REDIS_BACK_S)
def redis_frozen(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            with run.servers.frozen("redis"):
                time.sleep(run.scale.seconds)
            run.recovered(time.monotonic())


@fault(
    7, "Redis drops its clients", long=Scale(100, 8_000), short=Scale(10, 500), limit_s=REDIS_BACK_S
)
def redis_drops_clients(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            run.pause(0.5)
            for kind in ("normal", "pubsub"):
                run.stack.redis.client_kill_filter(_type=kind, skipme=True)
            run.recovered(time.monotonic())


@fault(
    21, "Redis's file truncated", long=Scale(10, 4_000), short=Scale(1, 500), limit_s=REDIS_BACK_S
)
def redis_truncated(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            run.pause(2)
            server = run.servers.process("redis")
            server.kill()
            file = _append_only_file(run.servers.redis_folder)
            size = file.stat().st_size
            with file.open("rb+") as open_file:
                open_file.truncate(run.chance.randint(size // 4, size))
            try:
                server.start()
            except RuntimeError:  # its operator then gives the file up
                shutil.rmtree(run.servers.redis_folder / "appendonlydir")
                server.start()
                run.note("the server refused its file, and began without it")
            run.recovered(time.monotonic())


def _append_only_file(folder: Path) -> Path:
    """The youngest part: what is written to now."""
    parts = (folder / "appendonlydir").glob("*.incr.aof")
    return max(parts, key=lambda part: part.stat().st_mtime)


# ── Kafka ────────────────────────────────────────────────────────────────────────────────────────


@fault(8, "Kafka frozen", long=Scale(3, 10_000, 60))
def kafka_frozen(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            with run.servers.frozen("log"):
                time.sleep(run.scale.seconds)
            run.recovered(time.monotonic())


@fault(8.1, "Kafka killed", long=Scale(10, 10_000), short=Scale(1, 500))
def kafka_killed(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            run.pause(2)
            run.recovered(run.servers.restart("log"))


# ── objects ──────────────────────────────────────────────────────────────────────────────────────


@fault(11, "object store down", long=Scale(3, 15_000, 60))
def objects_down(run: Run) -> None:
    with run.load(large=0.1):
        for _ in range(run.scale.repeats):
            with run.servers.down("objects"):
                time.sleep(run.scale.seconds)
            run.recovered(time.monotonic())


# ── full disks ───────────────────────────────────────────────────────────────────────────────────


def _full(run: Run, server: ServerName) -> None:
    """A server that ends because of it is started again once there is room."""
    with run.load(large=0.05):
        for _ in range(run.scale.repeats):
            with run.servers.full(server):
                time.sleep(run.scale.seconds)
            died = not run.servers.process(server).running
            run.servers.heal()
            run.recovered(time.monotonic())
            if died:
                run.note("the server had ended itself")


@fault(
    20,
    "disk of Kafka full",
    long=Scale(3, 5_000, 30),
    unable=_no_small_disks,
)
def kafka_disk_full(run: Run) -> None:
    _full(run, "log")


@fault(
    20.1,
    "disk of MinIO full",
    long=Scale(3, 5_000, 30),
    short=Scale(1, 500, 5),
    unable=_no_small_disks,
)
def objects_disk_full(run: Run) -> None:
    _full(run, "objects")


@fault(
    20.2,
    "disk of Redis full",
    long=Scale(3, 5_000, 30),
    unable=_no_small_disks,
)
def redis_disk_full(run: Run) -> None:
    _full(run, "redis")
