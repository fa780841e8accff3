"""Connections to Redis, and the one place where its errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra.settings import RedisSettings, Settings
from schemas.errors import Transient

Redis = redis.Redis

ANSWER_S = 10.0
"""How long a connection, and each answer, may take."""

_REFUSALS = (
    redis.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.NoPermissionError,
)


def connect_redis(settings: Settings) -> Redis:
    """Where queues, leases and slots are. A pool of connections, opened on first use.

    Every answer has a time limit; one retry on a fresh connection.
    """
    return _connect(settings.redis_address, settings.redis)


def connect_view(settings: Settings) -> Redis:
    """Where the job view is. As connect_redis."""
    return _connect(settings.view_address, settings.redis)


def _connect(url: str, options: RedisSettings) -> Redis:
    client: Redis = redis.Redis.from_url(
        url,
        socket_timeout=ANSWER_S,
        socket_connect_timeout=ANSWER_S,
        health_check_interval=0,
        retry=Retry(NoBackoff(), 1),
        max_connections=256,
        **(tls_options(options) if is_tls(url) else {}),
    )
    return client


def is_tls(url: str) -> bool:
    return url.startswith("rediss:")


def tls_options(options: RedisSettings) -> dict[str, Any]:
    """As redis-py and kombu take them. The server must prove that it has the name in the address."""
    files = {
        "ssl_ca_certs": options.ca_file,
        "ssl_certfile": options.cert_file,
        "ssl_keyfile": options.key_file,
    }
    named = {option: str(file) for option, file in files.items() if file}
    return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **named}


@contextmanager
def redis_errors() -> Iterator[None]:
    """Translate the client library's errors. Raises Transient (redis_unavailable, redis_forbidden).

    A refusal may pass, too: passwords are renewed on the server and in processes at different times.
    """
    try:
        yield
    except _REFUSALS as error:
        raise Transient(
            "redis_forbidden",
            f"Redis refuses us ({error}): check user and password in HEADRACE_REDIS_URL (and "
            "HEADRACE_VIEW_URL), and what the server's ACL allows this user.",
        ) from error
    except (
        redis.ConnectionError,
        redis.TimeoutError,
        redis.exceptions.ResponseError,
        OSError,
    ) as error:
        raise Transient(
            "redis_unavailable",
            f"Redis did not answer ({type(error).__name__}: {error}). Is the stack up? See `headrace status`; "
            "a server of your own is at HEADRACE_REDIS_URL.",
        ) from error


def as_any(value: Any) -> Any:
    """redis-py types every answer as sync-or-awaitable; this says that ours are plain values."""
    return value
