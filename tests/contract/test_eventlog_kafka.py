"""What only Kafka has: several members that share partitions, foreign writers, users, topics to be made."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, MemberToRemove
from kafka.structs import OffsetAndMetadata
from typer.testing import CliRunner

from headrace.cli.topics import app as topics_cli
from infra.eventlog import Consumer, EventLog, Fenced, Moved, NewRecord, Position, Record
from infra.eventlog.kafka import cluster_at
from infra.eventlog.kafka_producers import StaleMember
from infra.eventlog.kafka_topics import ensure_topics
from infra.eventlog.open import open_log
from infra.settings import KafkaSettings
from schemas.errors import InvalidJob, PipelineError, Transient
from schemas.topics import TOPIC_BY_NAME, TOPICS
from tests.servers.kafka import OPERATOR, PASSWORD, STRANGER, KafkaServer, fresh_topics

A = "jobs.image.standard"
RESULTS = "results"
PARTITIONS = 6
JOBS = 60
SCRIPT = Path(__file__).with_name("kafka_member.py")
SCALE = 10 if os.environ.get("HEADRACE_FAULTS") == "long" else 1
KILLS = 10 * SCALE

leaves_sockets = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Take = Callable[[Consumer, int], list[Record]]


@pytest.fixture
def url(make_kafka_url: Callable[..., str]) -> str:
    return make_kafka_url(PARTITIONS)


@pytest.fixture
def member(url: str) -> Iterator[Callable[..., Consumer]]:
    """A member of group g in a slot, reading images."""
    logs: list[EventLog] = []

    def join(slot: int) -> Consumer:
        logs.append(open_log(url, slot=slot))
        return logs[-1].consumer("g", [A])

    yield join
    for log in logs:
        log.close()


@pytest.fixture
def log(url: str) -> Iterator[EventLog]:
    with closing(open_log(url)) as log:
        yield log


@pytest.fixture
def collect_sockets(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """kafka-python leaves those that led nowhere to the garbage collector. What it logs must not hold them."""
    caplog.set_level(logging.CRITICAL, logger="kafka")
    yield
    gc.collect()


def new(topic: str, *keys: object) -> list[NewRecord]:
    return [NewRecord(topic, str(key), {}, b"value") for key in keys]


def positions(records: list[Record]) -> list[Position]:
    return [record.position for record in records]


def keys(records: list[Record]) -> list[str]:
    return sorted(record.key for record in records)


def answers(records: list[Record]) -> list[NewRecord]:
    return new(RESULTS, *(record.key for record in records))


def beside(task: Callable[[], Any], consumer: Consumer) -> tuple[Any, list[Record]]:
    """Run a task in a thread while this consumer goes on receiving, as a group needs it."""
    received: list[Record] = []
    with ThreadPoolExecutor(1) as pool:
        running: Future[Any] = pool.submit(task)
        while not running.done():
            received += consumer.receive(100, 2**20, timeout_s=0.02)
    return running.result(), received


# ── several members ──────────────────────────────────────────────────────────────────────────────


def test_a_second_member_takes_half_and_nothing_is_answered_twice(
    log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    log.append(new(A, *range(JOBS)))
    first = member(0)
    held = take(first, JOBS)

    second, _ = beside(lambda: member(1), first)

    with pytest.raises(Moved):
        first.complete(positions(held), answers(held))
    lost = first.lost()
    kept = [record for record in held if record.position not in lost]
    assert {p.partition for p in lost}.isdisjoint(record.position.partition for record in kept)
    first.complete(positions(kept), answers(kept))
    moved = take(second, len(lost))
    assert sorted(positions(moved)) == sorted(lost)
    second.complete(positions(moved), answers(moved))

    assert 0 < len(moved) < JOBS
    assert keys(list(log.read([RESULTS], 0))) == keys(held)
    assert log.lag("g", [A])[A] == (0, 0)


def test_what_stays_with_a_member_is_not_given_again(
    log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    log.append(new(A, *range(JOBS)))
    first = member(0)
    held = take(first, JOBS)
    first.complete(positions(held[::2]))
    _, given_again = beside(lambda: member(1), first)
    assert given_again == []
    lost = first.lost()
    assert set(lost) <= set(positions(held[1::2]))
    log.append(new(A, *range(JOBS, 2 * JOBS)))
    mine = take(first, 1)
    assert set(positions(mine)).isdisjoint(positions(held))


def test_the_window_of_a_topic_is_shared_by_its_partitions(log: EventLog, take: Take) -> None:
    log.append(new(A, *range(200)))
    with closing(log.consumer("w", [A], window=2 * PARTITIONS)) as consumer:
        held = take(consumer, 2 * PARTITIONS)
        assert consumer.receive(100, 2**20, timeout_s=0.3) == []

        consumer.complete(positions(held))

        assert len(take(consumer, 2 * PARTITIONS)) == 2 * PARTITIONS


def test_who_was_dealt_out_learns_it_and_writes_nothing(
    url: str, log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    log.append(new(A, *range(JOBS)))
    first = member(0)
    held = take(first, JOBS)
    cluster = cluster_at(url)
    with closing(cluster.admin()) as admin:
        admin.remove_group_members(cluster.name("g"), [MemberToRemove(group_instance_id="slot-0")])
    second = member(1)
    theirs = take(second, JOBS)
    with pytest.raises(Moved):
        beside(lambda: first.complete(positions(held), answers(held)), second)
    assert list(log.read([RESULTS], 0)) == []
    assert sorted(first.lost()) == sorted(positions(held))
    given_up = second.lost()
    still = [record for record in theirs if record.position not in given_up]
    second.complete(positions(still), answers(still))
    assert keys(list(log.read([RESULTS], 0))) == keys(still)


def test_what_a_refused_transaction_answered_does_not_go_with_the_next(
    member: Callable[..., Any], log: EventLog, take: Take
) -> None:
    log.append(new(A, *range(JOBS)))
    consumer = member(0)
    records = take(consumer, JOBS)
    partition = records[0].position.partition
    refused = [record for record in records if record.position.partition == partition]
    others = [record for record in records if record not in refused]

    stale = consumer._membership._replace(generation_id=consumer._membership.generation_id - 1)
    trackers = consumer._with_completed([record.position for record in refused])
    offsets = {name: OffsetAndMetadata(*t.encode(), -1) for name, t in trackers.items()}
    with pytest.raises(StaleMember):
        consumer._transactions.run([], offsets, stale)
    consumer.complete([record.position for record in others])
    consumer.close()

    again = take(member(0), len(refused))
    assert sorted(record.key for record in again) == sorted(record.key for record in refused)


def test_whoever_returns_to_its_slot_finds_its_partitions_and_only_what_was_open(
    log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    log.append(new(A, *range(JOBS)))
    first = member(0)
    held = take(first, JOBS)
    second, _ = beside(lambda: member(1), first)
    moved = first.lost()
    held = [record for record in held if record.position not in moved]
    first.complete(positions(held[:3]))
    first.close()
    returned = member(0)  # nobody else has to come to a new deal
    assert keys(take(returned, len(held) - 3)) == keys(held[3:])
    assert returned.receive(1, 2**20) == []
    assert second.lost() == []


@pytest.mark.timeout(120 * SCALE)
def test_members_that_come_and_go_answer_each_job_once(url: str, log: EventLog) -> None:
    chance = random.Random(7)
    with ExitStack() as running:
        members = {0: running.enter_context(member_process(url, 0))}
        for count in range(KILLS):
            log.append(new(A, *range(count * JOBS, (count + 1) * JOBS)))
            slot = chance.randrange(3)
            if slot in members:
                members[slot].kill()
            members[slot] = running.enter_context(member_process(url, slot))
            until_answered(log, chance.randrange(count * JOBS, (count + 1) * JOBS))
        until_answered(log, KILLS * JOBS)
    assert keys(list(log.read([RESULTS], 0))) == sorted(map(str, range(KILLS * JOBS)))


def until_answered(log: EventLog, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(log.read([RESULTS], 0))) < count:
        assert time.monotonic() < deadline


@contextmanager
def member_process(url: str, slot: int) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), url, str(slot)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def test_each_key_has_its_partition(log: EventLog) -> None:
    for _ in range(3):
        log.append(new(A, *range(20)))
    places: dict[str, set[int]] = {}
    for record in log.read([A], 0):
        places.setdefault(record.key, set()).add(record.position.partition)
    assert all(len(place) == 1 for place in places.values())
    assert len(set.union(*places.values())) > 1


# ── what others write ────────────────────────────────────────────────────────────────────────────


def test_a_foreign_record_without_key_value_or_text_is_read(
    url: str, log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    cluster = cluster_at(url)
    with closing(cluster.producer()) as producer:
        producer.send(cluster.name(A), b"bare", headers=[("h", b"\xff"), ("h2", b"")])
        producer.send(cluster.name(A), None, key=b"\xfe\xff")
    records = sorted(take(member(0), 2), key=lambda record: record.value)
    assert [(r.key, r.headers, r.value) for r in records] == [
        ("\ufffd\ufffd", {}, b""),
        ("", {"h": "\ufffd", "h2": ""}, b"bare"),
    ]


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_records_may_be_compressed(
    url: str, member: Callable[..., Consumer], take: Take, codec: str
) -> None:
    cluster = cluster_at(url)
    with closing(cluster.producer(compression_type=codec)) as producer:
        producer.send(cluster.name(A), b"value" * 1000, key=b"k")
    assert take(member(0), 1)[0].value == b"value" * 1000


def test_the_ends_of_transactions_are_no_open_records(
    log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    log.append(new(A, 1))
    first = member(0)
    first.complete(positions(take(first, 1)), new(RESULTS, "1"))
    reader = log.consumer("readers", [RESULTS])
    reader.complete(positions(take(reader, 1)))
    assert reader.lag()[RESULTS] == (0, 0)


def test_committed_metadata_that_is_not_ours_is_refused(
    url: str, log: EventLog, member: Callable[..., Consumer]
) -> None:
    cluster = cluster_at(url)
    offsets = {TopicPartition(cluster.name(A), 0): OffsetAndMetadata(0, "somebody's note!", -1)}
    with closing(cluster.admin()) as admin:
        admin.alter_group_offsets(cluster.name("g"), offsets)
    with pytest.raises(PipelineError, match="damaged") as caught:
        member(0)
    assert caught.value.code == "log_corrupt"


# ── what a cluster refuses ───────────────────────────────────────────────────────────────────────


def test_a_declared_topic_that_is_not_there_names_the_remedy(
    log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    absent = "control"
    log.append(new(A, 1))
    first = member(0)
    held = take(first, 1)
    attempts: list[Callable[[], object]] = [
        lambda: log.append(new(absent, 1)),
        lambda: log.consumer("g", [absent]),
        lambda: log.read([absent], 0),
        lambda: first.complete(positions(held), new(absent, 1)),
    ]
    for attempt in attempts:
        with pytest.raises(PipelineError, match="headrace topics apply") as caught:
            attempt()
        assert caught.value.code == "unknown_topic"
    first.complete(positions(held), answers(held))


def test_a_record_larger_than_ours_may_be_is_refused_before_anything_is_sent(
    log: EventLog,
) -> None:
    large = NewRecord(A, "large", {}, bytes(1024 * 1024))
    with pytest.raises(InvalidJob, match="by reference") as caught:
        log.append([*new(A, "small"), large])
    assert caught.value.code == "record_too_large"
    assert list(log.read([A], 0)) == []


def test_a_record_larger_than_the_cluster_takes_is_refused_and_the_rest_goes_on(
    url: str, log: EventLog, member: Callable[..., Consumer], take: Take
) -> None:
    limit_size(url, RESULTS, 10_000)
    large = NewRecord(RESULTS, "large", {}, bytes(20_000))
    log.append(new(A, 1))
    first = member(0)
    held = take(first, 1)
    for attempt in (lambda: log.append([large]), lambda: first.complete(positions(held), [large])):
        with pytest.raises(InvalidJob) as caught:
            attempt()
        assert caught.value.code == "record_too_large"
    assert list(log.read([RESULTS], 0)) == []
    first.complete(positions(held), answers(held))
    assert keys(list(log.read([RESULTS], 0))) == ["1"]


def test_a_commit_without_an_answer_ends_the_member_and_the_next_one_learns_what_it_did(
    kafka_server: KafkaServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.eventlog.kafka_producers.TRANSACTION_S", 1.0)
    with fresh_topics(kafka_server.url, [A, RESULTS], 1) as url, ExitStack() as logs:
        log, later = (logs.enter_context(closing(open_log(url))) for _ in range(2))
        log.append(new(A, 1, 2))
        first = log.consumer("g", [A])
        *done, last = take(first, 2)
        first.complete(positions(done), answers(done))
        held = [last]
        os.kill(kafka_server.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(Fenced):
                first.complete(positions(held), answers(held))
        finally:
            os.kill(kafka_server.process.pid, signal.SIGCONT)
        assert first.lost() == positions(held)
        second = later.consumer("g", [A])
        if second.lag()[A].open:
            again = take(second, 1)
            second.complete(positions(again), answers(again))
        assert keys(list(later.read([RESULTS], 0))) == ["1", "2"]


@leaves_sockets
@pytest.mark.usefixtures("collect_sockets")
def test_no_cluster_is_a_trouble_that_may_go_away() -> None:
    with closing(open_log("kafka://127.0.0.1:1")) as log, pytest.raises(Transient) as caught:
        log.append(new(A, 1))
    assert caught.value.code == "log_unavailable"


@pytest.mark.parametrize(
    "wrong",
    [
        "kafka://",
        "kafka://host",
        "kafka://host:port",
        "kafka://host:9092,",
        "kafka://host:9092/topic",
        "kafka://host:9092?user=me",
        "kafka://host:9092?prefix=a/b",
    ],
)
def test_a_wrong_address_is_refused(wrong: str) -> None:
    with pytest.raises(PipelineError, match="kafka://host:port,host:port") as caught:
        open_log(wrong)
    assert caught.value.code == "settings_invalid"


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(PipelineError, match="HEADRACE_KAFKA__PASSWORD") as caught:
        open_log("kafka://me:hunter2@host:9092")
    assert "hunter2" not in caught.value.message


# ── who one is ───────────────────────────────────────────────────────────────────────────────────


def secure(server: KafkaServer, **changes: Any) -> KafkaSettings:
    settings = {"username": OPERATOR, "password": PASSWORD, "ca_file": str(server.ca_file)}
    return KafkaSettings(tls=True, sasl="PLAIN", partitions=1, **(settings | changes))


def test_a_user_with_a_password_is_let_in_over_tls(kafka_server: KafkaServer, take: Take) -> None:
    url = f"{kafka_server.secure_url}?prefix=secure-{uuid.uuid4().hex}."
    settings = secure(kafka_server)
    ensure_topics(cluster_at(url, settings), [TOPIC_BY_NAME[A], TOPIC_BY_NAME[RESULTS]])
    with closing(open_log(url, kafka=settings)) as log:
        log.append(new(A, 1))
        consumer = log.consumer("g", [A])
        consumer.complete(positions(take(consumer, 1)), new(RESULTS, 1))
        assert keys(list(log.read([RESULTS], 0))) == ["1"]


@leaves_sockets
@pytest.mark.usefixtures("collect_sockets")
def test_a_wrong_password_is_refused_without_showing_it(kafka_server: KafkaServer) -> None:
    settings = secure(kafka_server, password="guessed")
    with (
        closing(open_log(kafka_server.secure_url, kafka=settings)) as log,
        pytest.raises(PipelineError, match="HEADRACE_KAFKA__PASSWORD") as caught,
    ):
        log.append(new(A, 1))
    assert caught.value.code == "log_forbidden"
    assert "guessed" not in caught.value.message


def test_a_user_who_may_do_nothing_is_told_so(kafka_server: KafkaServer) -> None:
    settings = secure(kafka_server, username=STRANGER)
    attempts: list[Callable[[EventLog], object]] = [
        lambda log: log.append(new(A, 1)),
        lambda log: log.consumer("g", [A]),
        lambda log: log.read([A], 0),
        lambda log: log.lag("g", [A]),
    ]
    with fresh_topics(kafka_server.url, [A], 1) as url:
        prefix = url.partition("?")[2]
        with closing(open_log(f"{kafka_server.secure_url}?{prefix}", kafka=settings)) as log:
            for attempt in attempts:
                with pytest.raises(PipelineError) as caught:
                    attempt(log)
                assert caught.value.code == "log_forbidden"


@leaves_sockets
@pytest.mark.usefixtures("collect_sockets")
def test_a_server_whose_certificate_nobody_vouches_for_is_not_spoken_to(
    kafka_server: KafkaServer,
) -> None:
    settings = secure(kafka_server, ca_file=None)
    with (
        closing(open_log(kafka_server.secure_url, kafka=settings)) as log,
        pytest.raises(Transient, match="HEADRACE_KAFKA__TLS"),
    ):
        log.append(new(A, 1))


# ── topics ───────────────────────────────────────────────────────────────────────────────────────


def test_topics_are_made_once_and_brought_into_line(kafka_address: str) -> None:
    url = f"{kafka_address}?prefix=topics-{uuid.uuid4().hex}."
    topics = [TOPIC_BY_NAME[A], TOPIC_BY_NAME[RESULTS]]

    def actions(dry_run: bool = False, **settings: int) -> list[str]:
        cluster = cluster_at(url, KafkaSettings(**settings))
        return [change.action for change in ensure_topics(cluster, topics, dry_run=dry_run)]

    assert actions(partitions=2, dry_run=True) == ["create", "create"]
    assert actions(partitions=2) == ["create", "create"]
    assert actions(partitions=2) == ["none", "none"]
    assert actions(partitions=3) == ["differs", "differs"]
    assert actions(partitions=2, min_insync_replicas=2, dry_run=True) == ["configure"] * 2
    assert actions(partitions=2, min_insync_replicas=2) == ["configure"] * 2
    assert actions(partitions=2, min_insync_replicas=2) == ["none", "none"]
    with closing(cluster_at(url).admin()) as admin:
        admin.delete_topics([cluster_at(url).name(topic.name) for topic in topics])


def test_topics_are_applied_from_the_command_line(
    kafka_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"cli-{uuid.uuid4().hex}."
    monkeypatch.setenv("HEADRACE_LOG_URL", f"{kafka_address}?prefix={prefix}")
    monkeypatch.setenv("HEADRACE_KAFKA__PARTITIONS", "1")
    runs = [["--dry-run"], [], []]
    shown = [CliRunner().invoke(topics_cli, ["apply", "--json", *run]) for run in runs]
    changes = [json.loads(run.stdout) for run in shown]
    assert [change["name"] for change in changes[0]] == [prefix + topic.name for topic in TOPICS]
    assert [{change["action"] for change in run} for run in changes] == [
        {"create"},
        {"create"},
        {"none"},
    ]
    with closing(cluster_at(kafka_address).admin()) as admin:
        admin.delete_topics([change["name"] for change in changes[0]])


def test_records_bear_the_clusters_time(url: str, log: EventLog) -> None:
    cluster = cluster_at(url)
    with closing(cluster.producer()) as producer:
        producer.send(cluster.name(A), b"", key=b"from the past", timestamp_ms=1000)
    log.append(new(A, "now"))
    times = {record.key: record.time for record in log.read([A], 0)}
    assert abs(times["from the past"] - times["now"]) < 600


def limit_size(url: str, topic: str, limit: int) -> None:
    cluster = cluster_at(url)
    change = {"max.message.bytes": str(limit)}
    with closing(cluster.admin()) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, cluster.name(topic), change)])
