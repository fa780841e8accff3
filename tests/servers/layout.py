"""The processes of docker-compose.yml without containers: `make up-real`.

Kafka, Redis and MinIO are plain processes. Each headrace service runs its own command, in the environment that
Compose gives it but for the servers' names, and is ready when its own health check says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from bench.bundles import NOOP, build_noop, noop_payload
from infra.embedded.child import ChildSpec
from infra.embedded.processes import StopSignals
from infra.embedded.supervisor import Event, Supervisor
from tests.servers.compose import Service, compose_config, services_of
from tests.servers.kafka import kafka_server
from tests.servers.minio import minio_server
from tests.servers.redis import redis_server

CHECK_EVERY_S = 0.25
PATIENCE_S = 120.0
JOBS = 20

Report = Callable[[Event], None]

console = Console(stderr=True, highlight=False)


class Layout:
    """The services, on servers that run. addresses: where these are, by what Compose calls them."""

    def __init__(self, services: list[Service], addresses: dict[str, str], folder: Path) -> None:
        self.services = {service.name: service for service in services}
        self.addresses = addresses
        self.folder = folder

    def run(self, service: str, *command: str) -> str:
        """As `docker compose run SERVICE COMMAND` does. Returns its standard output."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.services[service].environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{service}: {command} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    def set_up(self) -> None:
        for service in self.services.values():
            if not service.check:
                self.run(service.name, *service.command)

    @contextmanager
    def started(self, report: Report, signals: StopSignals) -> Iterator[Supervisor]:
        """Inside the block all services are ready, or somebody wants it over with."""
        kept = [service for service in self.services.values() if service.check]
        supervisor = Supervisor([_spec(service) for service in kept], self.folder / "logs", report)
        try:
            self._wait_until_ready(supervisor, signals)
            yield supervisor
        finally:
            patience_s = max(service.stop_s for service in kept)
            supervisor.stop(patience_s, signals.wait, lambda: signals.requests > 1)

    def _wait_until_ready(self, supervisor: Supervisor, signals: StopSignals) -> None:
        deadline = time.monotonic() + PATIENCE_S
        states = {"": "starting"}
        while set(states.values()) != {"ready"} and not signals.requests:
            if "failing" in states.values() or time.monotonic() > deadline:
                raise RuntimeError(f"expected all services to become ready, came {states}")
            supervisor.tick()
            signals.wait(supervisor.pause_s())
            states = {child.name: child.state for child in supervisor.describe()}


class Check:
    """A service's health check, run now and then."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._next_at = 0.0

    def __call__(self, _pid: int) -> bool:
        if time.monotonic() < self._next_at:
            return False
        self._next_at = time.monotonic() + CHECK_EVERY_S
        environment = {**os.environ, **self._service.environment}
        command = self._service.check or []
        return subprocess.run(command, env=environment, check=False).returncode == 0


@contextmanager
def layout_on_servers() -> Iterator[Layout]:
    """The servers, and what Compose runs once has been run. Skips where a server cannot be had."""
    with ExitStack() as open_now:
        kafka = open_now.enter_context(kafka_server())
        redis = open_now.enter_context(redis_server(persistent=True))
        s3 = open_now.enter_context(minio_server()).s3
        folder = Path(open_now.enter_context(tempfile.TemporaryDirectory(prefix="hr-layout-")))
        (folder / "logs").mkdir()
        config = compose_config(
            {
                "REDIS_PASSWORD": redis.password,
                "S3_ACCESS_KEY": s3.access_key,
                "S3_SECRET_KEY": s3.secret_key,
            }
        )
        addresses = {
            "kafka:9092": kafka.url.removeprefix("kafka://"),
            "redis:6379": redis.host,
            "minio:9000": s3.host,
        }
        layout = Layout(services_of(config, addresses, folder), addresses, folder)
        layout.set_up()
        yield layout


def run_jobs(layout: Layout) -> str:
    """Add a model and have jobs answered, by the command line. Returns what to say of it."""
    bundle = layout.folder / "bundles" / NOOP
    build_noop(bundle)
    layout.run("worker", "headrace", "models", "add", str(bundle))
    files = [layout.folder / f"{number}.bin" for number in range(JOBS)]
    for number, file in enumerate(files):
        file.write_bytes(noop_payload(number))
    began = time.monotonic()
    submit = ["headrace", "jobs", "submit", NOOP, *map(str, files), "--wait", "--json"]
    outcomes = [json.loads(line) for line in layout.run("worker", *submit).splitlines()]
    succeeded = sum(outcome["status"] == "succeeded" for outcome in outcomes)
    if succeeded != JOBS:
        raise RuntimeError(f"expected {JOBS} jobs to succeed, came {outcomes}")
    return f"{succeeded} of {JOBS} jobs succeeded in {time.monotonic() - began:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="run a few jobs, then stop")
    only_check = parser.parse_args().check
    try:
        with (
            StopSignals() as signals,
            layout_on_servers() as layout,
            layout.started(_say, signals) as supervisor,
        ):
            console.print(_table(layout))
            console.print(_hint(layout), markup=False, soft_wrap=True)
            if only_check:
                console.print(run_jobs(layout))
            while not only_check and not signals.requests:
                supervisor.tick()
                signals.wait(supervisor.pause_s())
    except (RuntimeError, pytest.skip.Exception, pytest.fail.Exception) as error:
        console.print(str(error), markup=False)
        return 1
    return 0


def _spec(service: Service) -> ChildSpec:
    command = tuple(service.command)
    return ChildSpec(service.name, command, Check(service), service.stage, service.environment)


def _say(event: Event) -> None:
    console.print(f"{event.child}: {event.text}", markup=False)


def _table(layout: Layout) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("service", "at", "command"):
        table.add_column(column, overflow="fold")
    for server, address in layout.addresses.items():
        table.add_row(server.partition(":")[0], address)
    for service in layout.services.values():
        if service.check:
            port = service.environment["HEADRACE_HEALTH_PORT"]
            table.add_row(service.name, f"127.0.0.1:{port}/readyz", " ".join(service.command))
    return table


def _hint(layout: Layout) -> str:
    """Secrets are in a file of ours alone, not on the screen."""
    file = layout.folder / "environment"
    variables = layout.services["worker"].environment
    lines = [
        f"{name}={shlex.quote(value)}"
        for name, value in variables.items()
        if name.startswith("HEADRACE_") and name != "HEADRACE_HEALTH_PORT"
    ]
    file.write_text("\n".join(lines) + "\n")
    return f"From another shell: `set -a; . {file}; headrace models list`. Ctrl-C ends it."


if __name__ == "__main__":
    sys.exit(main())
