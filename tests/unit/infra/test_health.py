"""What a process says of itself over HTTP, and the command that asks it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from infra.embedded.stack import python_environment
from infra.health import Health, is_ready, open_server, serve_health
from infra.settings import load_settings
from schemas.errors import PipelineError

ROOT = Path(__file__).parents[3]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(stalled_after_s=30, monotonic=clock)


@pytest.fixture
def serve() -> Iterator[Callable[[Health], int]]:
    """`serve(health)`: the port it is told at."""
    servers = []

    def start(health: Health) -> int:
        server = open_server("127.0.0.1", 0, health)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return server.server_port

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def status(port: int, path: str) -> tuple[int, str]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_a_process_is_alive_while_it_starts_and_ready_when_it_says_so(
    health: Health, clock: Clock, serve: Callable[[Health], int]
) -> None:
    port = serve(health)
    clock.now += 1000

    assert status(port, "/livez") == (200, "ok")
    assert status(port, "/readyz") == (503, "not ready")

    health.progress()
    health.ready = True

    assert status(port, "/readyz") == (200, "ok")


def test_a_draining_process_is_alive_and_not_ready(health: Health) -> None:
    health.progress()
    health.ready = True

    health.ready = False

    assert health.answer("/livez") == (200, "ok")
    assert health.answer("/readyz") == (503, "not ready")


def test_a_stalled_loop_is_neither_alive_nor_ready_until_it_goes_on(
    health: Health, clock: Clock
) -> None:
    health.ready = True
    health.progress()

    clock.now += 30
    assert health.answer("/livez")[0] == 200
    clock.now += 1

    assert health.answer("/livez") == (503, "stalled")
    assert health.answer("/readyz") == (503, "stalled")

    health.progress()

    assert health.answer("/readyz") == (200, "ok")


def test_other_paths_are_not_found(health: Health) -> None:
    assert health.answer("/")[0] == 404


def test_the_command_asks_the_process_of_the_environment(
    health: Health, serve: Callable[[Health], int]
) -> None:
    environment = {"HEADRACE_HEALTH_PORT": str(serve(health)), "HEADRACE_HEALTH_HOST": "0.0.0.0"}

    def ask() -> int:
        command = [sys.executable, "-m", "infra.health"]
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=30).returncode

    assert ask() == 1

    health.ready = True

    assert ask() == 0


def test_where_nobody_listens_nobody_is_ready(health: Health) -> None:
    with open_server("127.0.0.1", 0, health) as server:
        port = server.server_port

    assert not is_ready({"HEADRACE_HEALTH_PORT": str(port)})


def test_a_port_that_is_taken_is_said(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_server("127.0.0.1", 0, health) as server:
        monkeypatch.setenv("HEADRACE_HEALTH_PORT", str(server.server_port))

        with pytest.raises(
            PipelineError, match="set HEADRACE_HEALTH_PORT to a free port"
        ) as raised:
            serve_health(load_settings(), health)

    assert raised.value.code == "health_port_taken"


def test_without_a_port_nothing_listens(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_HEALTH_PORT", raising=False)
    before = threading.active_count()

    serve_health(load_settings(), health)

    assert threading.active_count() == before


def test_the_processes_of_the_embedded_stack_do_not_contend_for_one_port() -> None:
    assert python_environment(load_settings(health_port=8080))["HEADRACE_HEALTH_PORT"] == "0"


def test_the_command_imports_none_of_what_takes_long() -> None:
    code = (
        "import infra.health, sys; print({'pydantic', 'msgspec', 'structlog'} & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )

    assert done.stdout.strip() == "set()", done.stderr
