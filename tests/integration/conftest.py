"""Servers that the tests of deployments share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.settings import Settings, load_settings
from tests.servers.kafka import KafkaServer, kafka_server
from tests.servers.minio import minio_address
from tests.servers.redis import RedisServer, redis_server
from tests.servers.s3 import S3Server


@pytest.fixture(scope="session")
def broker() -> Iterator[KafkaServer]:
    """Apache Kafka with users and ACLs. Without Java and Maven its tests are skipped, with CI=true they fail."""
    with kafka_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with minio_address() as server:
        yield server


@pytest.fixture(scope="session")
def redis_of_ones_own() -> Iterator[RedisServer]:
    with redis_server(persistent=True) as server:
        yield server


@pytest.fixture
def deployment(
    broker: KafkaServer,
    s3: S3Server,
    redis_of_ones_own: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Settings]:
    """Settings, also in the environment, of a deployment on these servers that nobody has prepared yet."""
    name = tmp_path.name[:40].replace("_", "-")
    own = {
        "DATA_DIR": str(tmp_path / "data"),
        "LOG_URL": f"{broker.url}?prefix={name}.",
        "REDIS_URL": redis_of_ones_own.url,
        "OBJECTS_URL": s3.url(f"test-{name}".lower()),
        "S3__CACHE_DIR": str(tmp_path / "cache"),
        "KAFKA__PARTITIONS": "2",
    }
    for variable, value in own.items():
        monkeypatch.setenv(f"HEADRACE_{variable}", value)
    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    yield load_settings()
