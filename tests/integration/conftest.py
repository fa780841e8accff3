"""Servers that the tests of deployments share, and deployments on them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.eventlog.kafka import cluster_at
from infra.eventlog.kafka_topics import ensure_topics
from infra.settings import KafkaSettings, Settings, load_settings
from tests.servers.kafka import KafkaServer, kafka_server
from tests.servers.minio import minio_address
from tests.servers.redis import RedisServer, redis_server
from tests.servers.s3 import S3Server

Deploy = Callable[..., Settings]
PARTITIONS = 2
KEPT_DAYS = 15
"""As `headrace objects apply` has it."""


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
def deploy(
    broker: KafkaServer,
    s3: S3Server,
    redis_of_ones_own: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Deploy:
    """`deploy(prefix, bucket, LOG_URL=...)`: settings on these servers, in the environment too. By itself a
    deployment has neither topics nor a bucket."""

    def settings(prefix: str = "", bucket: str = "", **more: object) -> Settings:
        own = {
            "DATA_DIR": tmp_path / "data",
            "LOG_URL": f"{broker.url}?prefix={prefix or uuid.uuid4().hex}.",
            "REDIS_URL": redis_of_ones_own.url,
            "OBJECTS_URL": s3.url(bucket or f"test-{uuid.uuid4().hex}"),
            "S3__CACHE_DIR": tmp_path / "cache",
            "KAFKA__PARTITIONS": PARTITIONS,
        }
        named = {f"HEADRACE_{name}": str(value) for name, value in (own | more).items()}
        for name, value in (s3.environment | named).items():
            monkeypatch.setenv(name, value)
        return load_settings()

    return settings


@pytest.fixture(scope="session")
def prepared(
    broker: KafkaServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Prefix and bucket of a deployment that has all it needs."""
    from infra.objects.s3 import S3Objects

    prefix = f"sound-{uuid.uuid4().hex[:8]}"
    url = f"{broker.url}?prefix={prefix}."
    ensure_topics(cluster_at(url, KafkaSettings(partitions=PARTITIONS)))
    with s3.bucket() as bucket:
        cache = tmp_path_factory.mktemp("cache")
        S3Objects(s3.url(bucket), s3.settings(cache)).ensure_bucket(KEPT_DAYS)
        yield prefix, bucket


@pytest.fixture
def sound(deploy: Deploy, prepared: tuple[str, str]) -> Settings:
    """A deployment on which all is as it should be. Shared: who harms it makes it whole again."""
    return deploy(*prepared)
