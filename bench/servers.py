"""Apache Kafka, Redis and MinIO, one process each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.stack import ServersMissing
from tests.servers.kafka import VERSION, KafkaServer, kafka_server
from tests.servers.minio import PACKAGE, MinioServer, minio_server
from tests.servers.redis import RedisServer, redis_server

BUCKET = "headrace"
ABOUT = (
    f"Apache Kafka {VERSION}, one broker with a heap of 512 MiB; "
    f"MinIO {PACKAGE.rpartition('@')[2]}; Redis with an append-only file"
)


class Servers(NamedTuple):
    kafka: KafkaServer
    redis: RedisServer
    minio: MinioServer

    def pids(self) -> dict[str, int]:
        return {name: server.process.pid for name, server in self._asdict().items()}

    def settings(self, folder: Path) -> dict[str, Any]:
        """What is set where these servers are used. folder: for copies of objects."""
        s3 = self.minio.s3
        return {
            "log_url": self.kafka.url,
            "redis_url": self.redis.url,
            "objects_url": s3.url(BUCKET),
            "s3": s3.settings(folder / "copies"),
        }


@contextmanager
def real_servers() -> Iterator[Servers]:
    """Empty ones. Raises ServersMissing."""
    with ExitStack() as open_now:
        try:
            servers = Servers(
                open_now.enter_context(kafka_server(quick_start=False)),
                open_now.enter_context(redis_server(persistent=True)),
                open_now.enter_context(minio_server()),
            )
        except (pytest.skip.Exception, pytest.fail.Exception) as missing:
            raise ServersMissing(str(missing)) from None
        yield servers
