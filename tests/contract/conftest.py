"""Fixtures of the contract suites: each implementation of a seam is one parameter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from infra.eventlog import Consumer, EventLog, Record
from infra.eventlog.open import open_log
from tests.servers.kafka import KafkaServer, fresh_topics
from tests.servers.kafka import kafka_server as running_kafka

PATIENCE_S = 20.0
TOPICS_USED = (
    "jobs.image.standard",
    "jobs.text.bulk",
    "jobs.text.standard",
    "jobs.retry",
    "results",
)
"""On Kafka every test has its own; the others are declared, and not there."""


@pytest.fixture(params=["sqlite", "kafka"])
def log_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a log that nobody has used. A new implementation joins here."""
    if request.param == "kafka":
        fresh: str = request.getfixturevalue("make_kafka_url")()
        return fresh
    return f"sqlite://{tmp_path}/log.db"


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[KafkaServer]:
    """A broker of this run's own. Without Java and Maven its tests are skipped, with CI=true they fail."""
    with running_kafka() as server:
        yield server


@pytest.fixture(scope="session")
def kafka_address(request: pytest.FixtureRequest) -> str:
    """Any Kafka cluster on which everybody may do all."""
    given = os.environ.get("HEADRACE_TEST_KAFKA_URL")
    return given or request.getfixturevalue("kafka_server").url


@pytest.fixture
def make_kafka_url(kafka_address: str) -> Iterator[Callable[..., str]]:
    """Addresses with fresh topics, which are gone after the test."""
    with ExitStack() as made:

        def make(partitions: int = 1, topics: Sequence[str] = TOPICS_USED) -> str:
            return made.enter_context(fresh_topics(kafka_address, topics, partitions))

        yield make


@pytest.fixture
def log_factory(log_url: str) -> Iterator[Callable[[], EventLog]]:
    """Each call opens the same log anew, as another process would."""
    opened: list[EventLog] = []

    def open_another(on_append: Callable[[], None] | None = None) -> EventLog:
        opened.append(open_log(log_url, on_append=on_append))
        return opened[-1]

    yield open_another
    for log in opened:
        log.close()


@pytest.fixture
def log(log_factory: Callable[[], EventLog]) -> EventLog:
    return log_factory()


@pytest.fixture
def take() -> Callable[[Consumer, int], list[Record]]:
    """Receive so many records, waiting for as long as a log may need to hand them over."""

    def take_from(consumer: Consumer, count: int) -> list[Record]:
        deadline = time.monotonic() + PATIENCE_S
        records: list[Record] = []
        while len(records) < count and time.monotonic() < deadline:
            records += consumer.receive(count - len(records), 2**30, timeout_s=0.5)
        assert len(records) == count
        return records

    return take_from


@pytest.fixture
def nothing_more() -> Callable[[Consumer], bool]:
    return lambda consumer: consumer.receive(1, 2**30, timeout_s=0.05) == []
