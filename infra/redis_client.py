"""Connections to Redis, and the one place where its errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra.settings import Settings
from schemas.errors import Transient

Redis = redis.Redis


def connect_redis(settings: Settings) -> Redis:
    """A pool of connections, opened on first use. Every answer has a time limit; one retry on a fresh connection."""
    client: Redis = redis.Redis.from_url(
        settings.redis_address,
        socket_timeout=10,
        health_check_interval=0,
        retry=Retry(NoBackoff(), 1),
        max_connections=256,
    )
    return client


@contextmanager
def redis_errors() -> Iterator[None]:
    """Translate the client library's errors. Raises Transient (redis_unavailable)."""
    try:
        yield
    except (
        redis.ConnectionError,
        redis.TimeoutError,
        redis.exceptions.ResponseError,
        OSError,
    ) as error:
        raise Transient(
            "redis_unavailable",
            f"Redis did not answer ({type(error).__name__}: {error}). Is the stack up? See `headrace status`.",
        ) from error


def as_any(value: Any) -> Any:
    """redis-py types every answer as sync-or-awaitable; this says that ours are plain values."""
    return value
