"""What has to be true of Redis. Where it is the embedded one, it is so by its configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from redis.exceptions import ResponseError

from infra.checks import Finding, clock_finding
from infra.embedded.record import running_stack
from infra.embedded.redis_server import OLDEST_VERSION
from infra.redis_client import Redis, as_any, connect_redis, connect_view, redis_errors
from infra.settings import Settings


class Facts(NamedTuple):
    """persistent: it writes what it holds to disk; None where this user may not ask. skew_s: its clock less ours."""

    version: str
    policy: str
    persistent: bool | None
    skew_s: float


def redis_findings(settings: Settings) -> list[Finding]:
    """Of the broker, and of the view where that is another server. Raises Transient."""
    findings = list(_of_broker(settings))
    if settings.view_address != settings.redis_address:
        facts = look(connect_view(settings))
        findings += [version("view version", facts), clock("view clock", facts)]
    return findings


def _of_broker(settings: Settings) -> Iterator[Finding]:
    embedded = not settings.redis_url.get_secret_value()
    if embedded and not running_stack(settings):
        yield Finding("redis eviction", "ok", "not running; ours never evicts")
        return
    facts = look(connect_redis(settings))
    yield version("redis version", facts)
    yield eviction(facts)
    if not embedded:
        yield persistence(facts)
        yield clock("redis clock", facts)


def look(client: Redis) -> Facts:
    """Ask once, and close the client. Raises Transient."""
    with client, redis_errors():
        info = as_any(client.info())
        persistent = bool(info.get("aof_enabled")) or _saves(client)
        before = time.time()
        seconds, microseconds = as_any(client.time())
        ours = (before + time.time()) / 2
    return Facts(
        version=str(info["redis_version"]),
        policy=info.get("maxmemory_policy", "unknown"),
        persistent=persistent,
        skew_s=seconds + microseconds / 1e6 - ours,
    )


def version(check: str, facts: Facts) -> Finding:
    found = tuple(int(part) for part in facts.version.split(".")[:2])
    if found < OLDEST_VERSION:
        needed = ".".join(map(str, OLDEST_VERSION))
        return Finding(
            check,
            "fail",
            f"it is Redis {facts.version}",
            f"Run Redis {needed} or newer, or a Valkey: older ones lack BLMPOP.",
        )
    return Finding(check, "ok", f"speaks as Redis {facts.version}")


def eviction(facts: Facts) -> Finding:
    found = f"maxmemory-policy is {facts.policy}"
    if facts.policy == "noeviction":
        return Finding("redis eviction", "ok", found)
    return Finding(
        "redis eviction",
        "fail",
        found,
        "Set it to noeviction: what holds queues and leases must not drop them. The job view may be "
        "elsewhere: HEADRACE_VIEW_URL.",
    )


def persistence(facts: Facts) -> Finding:
    if facts.persistent is None:
        return Finding(
            "redis persistence", "ok", "not told: this user may not read its configuration"
        )
    if facts.persistent:
        return Finding("redis persistence", "ok", "it writes to disk")
    return Finding(
        "redis persistence",
        "warn",
        "it keeps nothing on disk: when it restarts, what runs is run again after a lease",
        "Set appendonly to yes.",
    )


def clock(check: str, facts: Facts) -> Finding:
    return clock_finding(check, facts.skew_s, "its clock")


def _saves(client: Redis) -> bool | None:
    """Whether it takes snapshots. Managed servers let nobody read their configuration."""
    try:
        return bool(as_any(client.config_get("save")).get("save"))
    except ResponseError:
        return None
