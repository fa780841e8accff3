"""Deployments with a mistake in them: each is told to somebody who can mend it, and loses no job meanwhile."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ConfigResource,
    ConfigResourceType,
    ResourcePattern,
    ResourceType,
)

from infra.eventlog import NewRecord, Record
from infra.eventlog.kafka import cluster_at
from infra.eventlog.open import connect_log, open_log
from infra.objects import connect_objects
from infra.preconditions import preconditions
from infra.settings import Settings
from schemas.errors import InvalidJob, PipelineError
from schemas.topics import RESULTS, dead_letter_topic
from tests.conftest import ROOT
from tests.servers.kafka import (
    OPERATOR,
    PASSWORD,
    STRANGER,
    KafkaServer,
    fresh_topics,
    kafka_server,
)
from tests.servers.minio import patience
from tests.servers.outdated import outdated_kafka, outdated_redis
from tests.servers.redis import RedisServer
from workers.dispatcher.memory import JobMemory
from workers.dispatcher.outcomes import Outcomes, RetryPolicy

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = patience()

A = "jobs.text.standard"
SECRET = "not-the-" + secrets.token_hex(8)
LARGE = os.urandom(300_000)
SMALL_LIMIT_BYTES = 200_000
PATIENCE_S = 60.0
TEN_MINUTES_S = 600

SHIFTED_CLOCK = f"""\
import time
wall = time.time
time.time = lambda: wall() + {TEN_MINUTES_S}
"""
"""Python runs it in every process that finds it as `sitecustomize`. Only time.time is shifted, which is what the
project's own code asks for the time of day."""

Deploy = Callable[..., Settings]


@pytest.fixture
def secured(broker: KafkaServer) -> dict[str, object]:
    """Settings of the broker's listener where one must say who one is."""
    return {
        "KAFKA__TLS": "true",
        "KAFKA__CA_FILE": broker.ca_file,
        "KAFKA__SASL": "PLAIN",
        "KAFKA__USERNAME": OPERATOR,
        "KAFKA__PASSWORD": PASSWORD,
    }


def dispatcher(**environment: str) -> str:
    """Start one on the settings in the environment, and see that it ends. Returns what it said of why."""
    done = subprocess.run(
        [sys.executable, "-m", "workers.dispatcher.main"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr
    told = [json.loads(line) for line in done.stderr.splitlines()]
    (line,) = [one for one in told if one["level"] == "error"]
    said: str = line["error"]
    return said


def refused(settings: Settings) -> str:
    with pytest.raises(PipelineError) as caught:
        preconditions(settings)
    return caught.value.message


# ── credentials and rights ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("KAFKA__PASSWORD", SECRET, "HEADRACE_KAFKA__PASSWORD"),
        ("REDIS_URL", f"redis://:{SECRET}@{{redis}}/0", "HEADRACE_REDIS_URL"),
        ("VIEW_URL", f"redis://someone:{SECRET}@{{redis}}/0", "HEADRACE_VIEW_URL"),
        ("S3__SECRET_KEY", SECRET, "HEADRACE_S3__SECRET_KEY"),
    ],
)
def test_a_dispatcher_with_wrong_credentials_ends_and_names_the_setting(
    deploy: Deploy,
    prepared: tuple[str, str],
    broker: KafkaServer,
    secured: dict[str, object],
    redis_of_ones_own: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: str,
    remedy: str,
) -> None:
    deploy(*prepared, LOG_URL=f"{broker.secure_url}?prefix={prepared[0]}.", **secured)
    monkeypatch.setenv(f"HEADRACE_{setting}", value.format(redis=redis_of_ones_own.host))

    assert remedy in dispatcher()


def test_a_job_is_accepted_by_a_client_whom_redis_refuses(
    sound: Settings, redis_of_ones_own: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace import Client

    monkeypatch.setenv("HEADRACE_REDIS_URL", f"redis://:{SECRET}@{redis_of_ones_own.host}/0")
    with Client() as client:
        client.log.append([new(A, "accepted")])

        assert [record.key for record in client.log.read([A], 0)] == ["accepted"]


@pytest.fixture
def rights(broker: KafkaServer) -> Iterator[Callable[..., None]]:
    """`rights(True, "TOPIC", name, "READ", ...)`: allow (or forbid) the stranger to do this with all such names."""
    cluster = cluster_at(broker.url)
    given: list[ACL] = []

    def give(allowed: bool, resource: str, name: str, *operations: str) -> None:
        kind = ACLPermissionType.ALLOW if allowed else ACLPermissionType.DENY
        pattern = ResourcePattern(
            ResourceType[resource],
            name,
            ACLResourcePatternType.LITERAL
            if resource == "CLUSTER"
            else ACLResourcePatternType.PREFIXED,
        )
        acls = [ACL(f"User:{STRANGER}", "*", ACLOperation[o], kind, pattern) for o in operations]
        given.extend(acls)
        with closing(cluster.admin()) as admin:
            admin.create_acls(acls)

    yield give
    with closing(cluster.admin()) as admin:
        admin.delete_acls(given)


def test_a_user_who_lacks_one_right_is_told_which(
    deploy: Deploy,
    prepared: tuple[str, str],
    broker: KafkaServer,
    secured: dict[str, object],
    rights: Callable[..., None],
) -> None:
    prefix = f"{prepared[0]}."
    stranger = secured | {"KAFKA__USERNAME": STRANGER}
    settings = deploy(*prepared, LOG_URL=f"{broker.secure_url}?prefix={prefix}", **stranger)
    assert "DESCRIBE on topic" in refused(settings)

    rights(True, "TOPIC", prefix, "READ", "WRITE", "DESCRIBE", "DESCRIBE_CONFIGS")
    rights(True, "GROUP", prefix, "READ")
    rights(True, "TRANSACTIONAL_ID", prefix, "WRITE", "DESCRIBE")
    until(lambda: allowed(settings))

    rights(False, "TOPIC", f"{prefix}{RESULTS}", "WRITE")
    until(lambda: not allowed(settings))
    assert "this user lacks WRITE on topic results" in refused(settings)

    rights(False, "GROUP", prefix, "ALL")
    rights(False, "TRANSACTIONAL_ID", prefix, "ALL")
    until(lambda: "transactional id" in refused(settings))
    assert f"READ on group {prefix}dispatcher" in refused(settings)


def allowed(settings: Settings) -> bool:
    """Rights take a moment to be known to the broker."""
    try:
        preconditions(settings)
    except PipelineError:
        return False
    return True


# ── what is missing, what is too old, what has another time ──────────────────────────────────────


def test_without_topics_and_bucket_nothing_starts_and_nothing_is_accepted(deploy: Deploy) -> None:
    settings = deploy()

    said = dispatcher()

    assert "`headrace topics apply`" in said
    assert "`headrace objects apply`" in said
    with (
        closing(connect_log(settings)) as log,
        pytest.raises(PipelineError, match="headrace topics apply"),
    ):
        log.append([new(A, "job")])
    with pytest.raises(PipelineError, match="headrace objects apply"):
        connect_objects(settings).put("tenants/t/payload", b"bytes")


def test_a_kafka_that_is_too_old_is_refused(deploy: Deploy) -> None:
    with outdated_kafka() as url:
        settings = deploy(LOG_URL=url, REDIS_URL="", OBJECTS_URL="")

        assert "Kafka 2.5 or newer is needed, the cluster has 2.4" in refused(settings)


def test_a_redis_that_is_too_old_is_refused(deploy: Deploy) -> None:
    with outdated_redis() as url:
        deploy(LOG_URL="", REDIS_URL=url, OBJECTS_URL="")

        assert "Run Redis 7.0 or newer" in dispatcher()


def test_a_dispatcher_whose_clock_is_ten_minutes_ahead_of_all_servers_does_not_start(
    sound: Settings, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHIFTED_CLOCK)

    said = dispatcher(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))

    for server in ("kafka clock", "redis clock", "object store clock"):
        assert server in said
    assert "behind ours. Synchronise the clocks" in said


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., Stack], small_bundles: list[Path]) -> Iterator[Stack]:
    stack = make_stack()
    stack.headrace("models", "add", *small_bundles[:2])
    stack.up()
    yield stack
    stack.down()


@pytest.mark.parametrize("skew_s", [TEN_MINUTES_S, -TEN_MINUTES_S])
def test_a_client_whose_clock_is_wrong_by_ten_minutes_gets_its_results(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, skew_s: int
) -> None:
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + skew_s)
    client = stack.client()

    jobs = client.submit_many("obey", [b'{"number": 1}'] * 5)

    assert [job.wait().status for job in jobs] == ["succeeded"] * 5


def test_a_deadline_that_is_over_by_the_dispatchers_clock_ends_the_job_visibly(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() - TEN_MINUTES_S)

    job = stack.client().submit("obey", b"{}", deadline_s=TEN_MINUTES_S / 2)

    assert job.wait().status == "expired"


# ── limits of the broker ─────────────────────────────────────────────────────────────────────────


def test_a_broker_that_keeps_too_little_of_a_commit_loses_nothing_and_is_named() -> None:
    """64 characters hold what became of 384 records; here 600 are open, and the first is the last to end."""
    jobs = [new(A, str(number)) for number in range(600)]
    with (
        kafka_server("offset.metadata.max.bytes=64\n") as server,
        fresh_topics(server.url, [A, RESULTS], 1) as url,
        closing(open_log(url)) as log,
    ):
        assert "offset.metadata.max.bytes is 64" in refused(Settings(log_url=url))
        log.append(jobs)
        consumer = log.consumer("g", [A])
        records = take(consumer, 600)

        with pytest.raises(PipelineError, match=r"set offset\.metadata\.max\.bytes to 4096"):
            complete(consumer, records[1:])

        assert list(log.read([RESULTS], 0)) == []
        consumer.close()
        with closing(open_log(url)) as again:
            consumer = again.consumer("g", [A])
            complete(consumer, take(consumer, 600))
            assert sorted(r.key for r in again.read([RESULTS], 0)) == sorted(r.key for r in jobs)


@pytest.fixture
def url(broker: KafkaServer) -> Iterator[str]:
    with fresh_topics(broker.url, [A, RESULTS, dead_letter_topic(A)], 1) as url:
        yield url


def test_a_job_that_the_broker_refuses_by_size_is_not_accepted_and_its_sender_told(
    url: str,
) -> None:
    with closing(open_log(url)) as log:
        make_small(url, A)

        with pytest.raises(InvalidJob, match=r"by reference, or raise .* max\.message\.bytes"):
            log.append([new(A, "large", LARGE)])
        log.append([new(A, "small")])

        assert [record.key for record in log.read([A], 0)] == ["small"]


def test_a_dead_letter_that_the_broker_refuses_by_size_goes_without_its_value(url: str) -> None:
    with closing(open_log(url)) as log:
        log.append([new(A, "1", LARGE), new(A, "2")])
        consumer = log.consumer("g", [A])
        outcomes = outcomes_of(consumer)
        make_small(url, dead_letter_topic(A))
        for record in take(consumer, 2):
            outcomes.reject(record, InvalidJob("job_malformed", "It is no job."))

        outcomes.commit(time.time())

        letters = {record.key: record for record in log.read([dead_letter_topic(A)], 0)}
        assert {key: len(letter.value) for key, letter in letters.items()} == {"1": 0, "2": 5}
        assert letters["1"].headers["x-value-dropped"] == f"{len(LARGE)} bytes"
        assert letters["1"].headers["x-original-topic"] == A


def test_a_result_that_the_broker_refuses_by_size_stays_open_and_the_topic_is_named(
    url: str,
) -> None:
    with closing(open_log(url)) as log:
        log.append([new(A, "1")])
        consumer = log.consumer("g", [A])
        (record,) = take(consumer, 1)
        make_small(url, RESULTS)

        with pytest.raises(InvalidJob, match=r"max\.message\.bytes"):
            consumer.complete([record.position], [new(RESULTS, "1", LARGE)])

        assert "results" in refused(Settings(log_url=url))
        consumer.complete([record.position], [new(RESULTS, "1")])
        assert [record.key for record in log.read([RESULTS], 0)] == ["1"]


def make_small(url: str, topic: str) -> None:
    """The broker takes no record on this topic any more that is larger than SMALL_LIMIT_BYTES."""
    cluster = cluster_at(url)
    name, limit = cluster.name(topic), {"max.message.bytes": str(SMALL_LIMIT_BYTES)}
    with closing(cluster.admin()) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, limit)])
        until(lambda: limit.items() <= told(admin, name).items())


def told(admin: Any, topic: str) -> dict[str, str]:
    """A topic's settings, as the broker knows them by now."""
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    found = admin.describe_configs([resource], config_filter="all")["topic"][topic]
    return {name: entry["value"] for name, entry in found.items()}


class NoView:
    def show(self, *_: object) -> None:
        pass


def outcomes_of(consumer: Any) -> Outcomes:
    return Outcomes(consumer, JobMemory(0, 0), NoView(), RetryPolicy(1, 1))  # type: ignore[arg-type]


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def new(topic: str, key: str, value: bytes = b"value") -> NewRecord:
    return NewRecord(topic, key, {}, value)


def take(consumer: Any, count: int) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(records) < count:
        assert time.monotonic() < deadline, f"{len(records)} of {count} came"
        records += consumer.receive(count - len(records), 2**30, timeout_s=0.5)
    return records


def complete(consumer: Any, records: list[Record]) -> None:
    results = [new(RESULTS, record.key) for record in records]
    consumer.complete([record.position for record in records], results)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain"
        time.sleep(0.02)
