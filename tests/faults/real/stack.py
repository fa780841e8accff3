"""Dispatchers and workers on real servers, as processes that may be harmed one by one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import redis
from kafka import KafkaAdminClient

from tests.conftest import ROOT
from tests.faults.real.bundles import install_steps, make_bundles
from tests.faults.real.keeper import Keeper
from tests.faults.real.servers import Role, ServerName, Servers
from tests.faults.real.watcher import Watcher

LEASE_S = 2.0
SESSION_S = 6.0
"""The shortest that Kafka allows."""

PARTITIONS = 3
CHECKER = Path(__file__).with_name("checker.py")

SETTINGS = {
    "KAFKA__PARTITIONS": PARTITIONS,
    "KAFKA__SESSION_TIMEOUT_S": SESSION_S,
    "DISPATCHER__RETRY_BASE_S": 0.05,
    "WORKER__EXECUTORS": 2,
    # Jobs fail on purpose here.
    "BREAKER__CONSECUTIVE": 1_000_000,
    "BREAKER__MIN_JOBS": 1_000_000,
}


class RealStack:
    """Its topics, its processes and who looks at them. proxied: every link goes through its proxy."""

    def __init__(
        self, servers: Servers, folder: Path, *, proxied: bool = False, lease_s: float = LEASE_S
    ) -> None:
        self.servers = servers
        self.folder = folder
        self.proxied = proxied
        self.lease_s = lease_s
        self.prefix = f"f{uuid.uuid4().hex[:8]}."
        self.redis = redis.Redis.from_url(servers.redis.url)
        self.redis.flushall()
        self._steps = install_steps(folder / "steps")
        self._headrace("topics", "apply")
        self._headrace("models", "add", *make_bundles(folder / "models"))
        self.keeper = Keeper(folder, ROOT)
        self.watcher = Watcher(self.kafka_address, f"{self.prefix}results")

    def close(self) -> None:
        """Not gently: what a stop must do is tested elsewhere."""
        self.keeper.close()
        self.watcher.close()
        self.redis.close()
        with closing(KafkaAdminClient(bootstrap_servers=self.kafka_address)) as admin:
            admin.delete_topics([t for t in admin.list_topics() if t.startswith(self.prefix)])

    # ── processes ────────────────────────────────────────────────────────────────────────────────

    def scale(self, *, dispatchers: int | None = None, workers: int | None = None) -> None:
        """As many processes of a kind as are wanted, all of them ready."""
        if dispatchers is not None:
            self._scale("dispatcher", dispatchers)
        if workers is not None:
            self._scale("worker", workers)
        self.keeper.until_all_ready()

    def names(self, role: str) -> list[str]:
        return [name for name in self.keeper.names if name.startswith(role)]

    def environment(self, role: Role, **more: object) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name[:9] != "HEADRACE_"}
        s3 = self.servers.minio.s3
        log, objects, store = (self._host(role, name) for name in ("log", "objects", "redis"))
        settings = SETTINGS | {
            "LOG_URL": f"kafka://{log}?prefix={self.prefix}",
            "OBJECTS_URL": s3.url(self.servers.bucket, objects),
            "REDIS_URL": self.servers.redis.url.replace(self.servers.redis.host, store),
            "S3__CACHE_DIR": self.folder / "objects",
            "DATA_DIR": self.folder,
            "DISPATCHER__LEASE_S": self.lease_s,
        }
        own |= {f"HEADRACE_{name}": str(value) for name, value in (settings | more).items()}
        path = os.pathsep.join([str(self._steps), str(ROOT)])
        return {**own, **s3.environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def _scale(self, role: Role, count: int) -> None:
        for number in reversed(range(count, len(self.names(role)))):
            self.keeper.remove(f"{role}-{number}")
        for number in range(len(self.names(role)), count):
            self.start(role, number)

    def start(self, role: Role, number: int, command: list[str] | None = None) -> None:
        """command: instead of the usual one, at every start."""
        name = f"{role}-{number}"
        if role == "dispatcher":
            module, ready = "workers.dispatcher.main", "dispatcher"
            environment = self.environment(role, DISPATCHER__SLOT=number)
        else:
            module, ready = "workers.inference.main", name
            environment = self.environment(role, WORKER__NAME=name)
        self.keeper.add(name, command or [sys.executable, "-m", module], environment, ready)

    def _host(self, role: Role, server: ServerName) -> str:
        if self.proxied and (role, server) in self.servers.links:
            return self.servers.links[role, server].host
        hosts = {"log": self.kafka_address, "redis": self.servers.redis.host}
        return hosts.get(server) or self.servers.minio.s3.host

    # ── looking ──────────────────────────────────────────────────────────────────────────────────

    @property
    def kafka_address(self) -> str:
        return f"127.0.0.1:{self.servers.kafka.port}"

    def beat(self, dispatcher: int = 0) -> dict[str, Any]:
        """What a dispatcher says of itself; empty if it says nothing."""
        raw = self.redis.get(f"headrace:dispatcher:{dispatcher}")
        said: dict[str, Any] = json.loads(raw) if raw else {}
        return said

    def output(self, name: str) -> str:
        """What a process has said in all its lives."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def write_stacks(self) -> None:
        """What each process is doing just now, where py-spy is installed."""
        if py_spy := shutil.which("py-spy"):
            for name in self.keeper.names:
                with (self.folder / f"{name}.stacks").open("ab") as out:
                    command = [py_spy, "dump", "--pid", str(self.keeper.pid(name))]
                    subprocess.run(command, stdout=out, stderr=out, check=False)

    def check(self, accepted: Path, *, live: bool = False, outcomes: int = 1) -> dict[str, Any]:
        """What the checker finds, a process that trusts nobody."""
        command = [sys.executable, str(CHECKER), "--servers", self.kafka_address]
        command += ["--prefix", self.prefix, "--accepted", str(accepted)]
        command += ["--outcomes", str(outcomes)]
        if live:
            command.append("--live")
        else:
            seen = accepted.with_suffix(".seen")
            ids = [line.split()[0] for line in accepted.read_text().splitlines()]
            self.watcher.write(seen, ids)
            command += ["--seen", str(seen), "--redis"]
        done = subprocess.run(
            command,
            env={**os.environ, "REDIS_URL": self.servers.redis.url},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"the checker failed:\n{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def headrace(self, *args: object) -> subprocess.Popen[str]:
        """A command of the product that has been started."""
        return subprocess.Popen(
            [sys.executable, "-m", "headrace", *map(str, args)],
            cwd=ROOT,
            env=self.environment("client"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _headrace(self, *args: object) -> None:
        running = self.headrace(*args)
        said, _ = running.communicate()
        if running.returncode:
            raise RuntimeError(f"headrace {args}: {said}")


@contextmanager
def real_stack(
    servers: Servers, *, proxied: bool = False, lease_s: float = LEASE_S
) -> Iterator[RealStack]:
    """A stack with topics and models of its own, and no processes yet."""
    with ExitStack() as closing_up:
        folder = closing_up.enter_context(
            tempfile.TemporaryDirectory(prefix="hr-faults-", ignore_cleanup_errors=True)
        )
        servers.heal()
        stack = RealStack(servers, Path(folder), proxied=proxied, lease_s=lease_s)
        closing_up.callback(stack.close)
        closing_up.callback(servers.heal)
        yield stack
