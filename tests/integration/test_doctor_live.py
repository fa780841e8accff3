"""`headrace doctor`, and the preconditions of a process, against servers that run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import redis
from kafka.admin import ConfigResource, ConfigResourceType
from typer.testing import CliRunner

from headrace.cli import app
from infra.eventlog.kafka import cluster_at
from infra.objects.s3 import S3Objects
from infra.preconditions import preconditions
from infra.settings import Settings
from schemas.errors import PipelineError
from schemas.topics import JOB_TOPICS
from tests.servers.minio import patience
from tests.servers.redis import RedisServer, redis_server

pytestmark = patience()

PATIENCE_S = 20.0
A, B = JOB_TOPICS[:2]
WORTH_KNOWING = {"models", "kafka durability", "engine keys"}
"""No model is installed, there is but one broker, and engines are not signed."""

Findings = dict[str, dict[str, str]]


def run(*command: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == code, done.output
    return done.stdout


def doctor(*, code: int) -> Findings:
    """What it says, by check."""
    return {finding["check"]: finding for finding in json.loads(run("doctor", "--json", code=code))}


def refused(settings: Settings) -> str:
    """Why a dispatcher does not start."""
    with pytest.raises(PipelineError) as caught:
        preconditions(settings)
    return caught.value.message


def test_a_new_deployment_is_told_what_to_do_and_passes_once_it_is_done(
    deploy: Callable[..., Settings],
) -> None:
    settings = deploy()
    found = doctor(code=1)
    assert found["kafka topics"]["level"] == found["object store"]["level"] == "fail"
    assert "headrace topics apply" in refused(settings)

    run("topics", "apply")
    assert "headrace objects apply" in refused(settings)

    run("objects", "apply")
    preconditions(settings)
    found = doctor(code=0)
    assert {name for name in found if found[name]["level"] != "ok"} == WORTH_KNOWING
    assert all(finding["remedy"] for finding in found.values() if finding["level"] != "ok")
    assert "0 jobs open" in found["event log"]["detail"]


@pytest.mark.parametrize(
    ("check", "level", "setting"),
    [
        ("kafka retention", "fail", {"retention.ms": "3600000"}),
        ("kafka retention", "fail", {"retention.bytes": "1000000"}),
        ("kafka topics", "warn", {"retention.ms": "700000000"}),
        ("kafka topics", "fail", {"cleanup.policy": "compact"}),
        ("kafka topics", "fail", {"message.timestamp.type": "CreateTime"}),
        ("kafka record size", "fail", {"max.message.bytes": "100000"}),
    ],
)
def test_a_topic_that_is_badly_set_is_found(
    sound: Settings, check: str, level: str, setting: dict[str, str]
) -> None:
    with topic_set(sound, A, setting):
        found = doctor(code=1 if level == "fail" else 0)
        assert found[check]["level"] == level
        assert A in found[check]["detail"] or check == "kafka retention"
        if level == "fail":
            assert check in refused(sound)
        else:
            preconditions(sound)


@contextmanager
def topic_set(settings: Settings, topic: str, own: dict[str, str]) -> Iterator[None]:
    cluster = cluster_at(settings.log_url, settings.kafka)
    with closing(cluster.admin()) as admin:
        before = told(admin, cluster.name(topic))
        alter(admin, cluster.name(topic), own)
        try:
            yield
        finally:
            alter(admin, cluster.name(topic), {name: before[name] for name in own})


def alter(admin: Any, topic: str, settings: dict[str, str]) -> None:
    """The broker knows of it on return."""
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, settings)])
    until(lambda: told(admin, topic).items() >= settings.items())


def told(admin: Any, topic: str) -> dict[str, str]:
    """A topic's settings, as the broker knows them by now."""
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    found = admin.describe_configs([resource], config_filter="all")["topic"][topic]
    return {name: entry["value"] for name, entry in found.items()}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain"
        time.sleep(0.02)


def test_topics_with_jobs_of_unequal_width_are_found(deploy: Callable[..., Settings]) -> None:
    settings = deploy()
    run("topics", "apply")
    cluster = cluster_at(settings.log_url, settings.kafka)
    with closing(cluster.admin()) as admin:
        admin.create_partitions({cluster.name(B): 3})
        until(lambda: len(admin.describe_topics([cluster.name(B)])[0]["partitions"]) == 3)

    found = doctor(code=1)

    assert found["kafka partitions"]["level"] == "fail"
    assert f"{B} has 3" in found["kafka partitions"]["detail"]


def test_a_redis_that_evicts_or_keeps_nothing_is_found(deploy: Callable[..., Settings]) -> None:
    with redis_server() as server, redis.Redis.from_url(server.url) as admin:
        settings = deploy(REDIS_URL=server.url, LOG_URL="", OBJECTS_URL="")
        assert doctor(code=0)["redis persistence"]["level"] == "warn"
        preconditions(settings)

        admin.config_set("maxmemory-policy", "allkeys-lru")

        assert doctor(code=1)["redis eviction"]["level"] == "fail"
        assert "noeviction" in refused(settings)


def test_a_view_of_its_own_may_evict(
    deploy: Callable[..., Settings], redis_of_ones_own: RedisServer
) -> None:
    with redis_server(more="maxmemory-policy allkeys-lru") as view:
        settings = deploy(VIEW_URL=view.url, LOG_URL="", OBJECTS_URL="")

        found = doctor(code=0)
        preconditions(settings)

    assert found["redis eviction"]["level"] == "ok"
    assert found["view version"]["level"] == "ok"


def test_a_redis_user_who_may_not_ask_for_settings_passes(deploy: Callable[..., Settings]) -> None:
    with redis_server() as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-config")
        deploy(REDIS_URL=f"redis://app:pw@{server.host}/0", LOG_URL="", OBJECTS_URL="")

        found = doctor(code=0)

    assert "not told" in found["redis persistence"]["detail"]


@pytest.mark.parametrize(("days", "level"), [(14, "ok"), (3, "fail")])
def test_a_bucket_that_forgets_too_soon_is_found(sound: Settings, days: int, level: str) -> None:
    objects = S3Objects(sound.objects_url, sound.s3)
    objects.ensure_bucket(days)
    try:
        found = doctor(code=1 if level == "fail" else 0)
    finally:
        run("objects", "apply")

    assert found["object store lifecycle"]["level"] == level


def test_a_bucket_that_forgets_nothing_is_warned_of(
    deploy: Callable[..., Settings], s3: Any
) -> None:
    with s3.bucket() as bucket:
        deploy(bucket=bucket, LOG_URL="", REDIS_URL="")

        found = doctor(code=0)

    assert found["object store"]["level"] == "ok"
    assert found["object store lifecycle"]["level"] == "warn"
