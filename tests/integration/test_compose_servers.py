"""The servers of docker-compose.yml by their own definitions there, but for ports and folders: command, settings,
health check. As plain processes of the same programs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from infra.embedded.redis_server import find_server
from infra.eventlog.kafka import cluster_at
from infra.eventlog.kafka_topics import ensure_topics
from infra.settings import KafkaSettings
from schemas.topics import TOPICS
from tests.servers.compose import compose_config
from tests.servers.kafka import jars
from tests.servers.minio import patience, program
from tests.servers.process import ServerProcess, free_port

SECRETS = {"REDIS_PASSWORD": "red-secret", "S3_ACCESS_KEY": "key-id", "S3_SECRET_KEY": "s3-secret"}

Start = Callable[[list[str], dict[str, str], Callable[[], bool]], ServerProcess]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose_config(SECRETS)["services"]
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(command, environment, ready)`: a process in the test's folder."""
    with ExitStack() as started:

        def run(
            command: list[str], environment: dict[str, str], ready: Callable[[], bool]
        ) -> ServerProcess:
            words = ["env", *(f"{name}={value}" for name, value in environment.items()), *command]
            process = ServerProcess(words, tmp_path, ready)
            started.callback(process.kill)
            process.start()
            return process

        yield run


def healthy(service: dict[str, Any], compose_port: int, port: int) -> bool:
    """By its own check, on another port."""
    check = [
        word.replace(f"/{compose_port}", f"/{port}") for word in service["healthcheck"]["test"]
    ]
    done = subprocess.run(check[1:], stderr=subprocess.DEVNULL, timeout=5, check=False)
    return done.returncode == 0


def test_redis_keeps_its_data_refuses_to_forget_and_wants_a_password_that_is_no_argument(
    services: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    port = free_port()
    (tmp_path / "redis-server").symlink_to(find_server().path)
    command = [
        word.replace("port 6379", f"port {port}").replace("dir /data", f"dir {tmp_path}")
        for word in services["redis"]["command"]
    ]
    path = f"{tmp_path}:{os.environ['PATH']}"

    with redis.Redis(port=port, password=SECRETS["REDIS_PASSWORD"]) as client:

        def ready() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        server = start(command, {**services["redis"]["environment"], "PATH": path}, ready)
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    arguments = Path(f"/proc/{server.pid}/cmdline")
    if arguments.exists():
        assert SECRETS["REDIS_PASSWORD"] not in arguments.read_text()
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


@patience()
def test_minio_is_healthy_by_its_own_check_while_it_runs(
    services: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    port = free_port()
    minio = services["minio"]
    assert not healthy(minio, 9000, port)
    command = [str(program()), "server", "--address", f"127.0.0.1:{port}", str(tmp_path / "data")]

    server = start(command, minio["environment"], lambda: healthy(minio, 9000, port))
    server.kill()

    assert not healthy(minio, 9000, port)


def test_kafka_takes_its_settings_and_our_topics(
    services: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    kafka = services["kafka"]
    ports = {name: free_port() for name in ("9092", "9093", "9094")}
    properties = tmp_path / "server.properties"
    properties.write_text(_properties(kafka["environment"], ports, tmp_path / "data"))
    java = ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{jars()}/*"]
    cluster = kafka["environment"]["CLUSTER_ID"]
    format_it = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster}"]
    format_it += ["-c", str(properties)]
    subprocess.run([*java, *format_it], cwd=tmp_path, check=True, capture_output=True)
    heap = kafka["environment"]["KAFKA_HEAP_OPTS"].split()

    start(
        [java[0], *heap, *java[1:], "kafka.Kafka", str(properties)],
        {},
        lambda: healthy(kafka, 9092, int(ports["9092"])),
    )

    for listener in ("9092", "9094"):
        cluster_here = cluster_at(f"kafka://127.0.0.1:{ports[listener]}", KafkaSettings())
        assert {change.name for change in ensure_topics(cluster_here)} == {t.name for t in TOPICS}


def _properties(environment: dict[str, str], ports: dict[str, int], data: Path) -> str:
    """As the image makes them of its environment: KAFKA_LOG_DIRS is log.dirs."""
    lines = []
    for name, value in environment.items():
        if not name.startswith("KAFKA_") or name == "KAFKA_HEAP_OPTS":
            continue
        for compose_port, port in ports.items():
            value = value.replace(f":{compose_port}", f":{port}")
        value = value.replace("//kafka:", "//127.0.0.1:").replace("//:", "//127.0.0.1:")
        value = value.replace("/var/lib/kafka/data", str(data))
        lines.append(f"{name.removeprefix('KAFKA_').lower().replace('_', '.')}={value}\n")
    return "".join(lines)
