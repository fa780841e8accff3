"""The event log of many machines: Apache Kafka, 2.5 or newer, with topics made by `headrace topics apply`."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from urllib.parse import parse_qsl, urlsplit

from infra.eventlog import Lag, NewRecord, Record
from infra.eventlog.kafka_cluster import Cluster, check_declared
from infra.eventlog.kafka_consumer import KafkaMember
from infra.eventlog.kafka_offsets import KafkaFollower, lag_of, replay, trim
from infra.eventlog.kafka_producers import Appender
from infra.eventlog.kafka_records import encode
from infra.settings import KafkaSettings
from schemas.errors import PipelineError

SERVER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:@/\[\]]+):[0-9]{1,5}")
PREFIX = re.compile(r"[a-zA-Z0-9._-]{0,100}")


class KafkaLog:
    """May be used from several threads; each consumer from one. Connects when it is first used.

    slot: which of its group's members this process is. A newer process in the slot puts an older one out.
    """

    def __init__(
        self, cluster: Cluster, slot: int = 0, on_append: Callable[[], None] | None = None
    ) -> None:
        self._cluster = cluster
        self._slot = slot
        self._ring = on_append or (lambda: None)
        self._appender = Appender(cluster)
        self._known: set[str] = set()
        self._members: list[KafkaMember] = []

    def append(self, records: Sequence[NewRecord]) -> None:
        if not records:
            return
        self._check({record.topic for record in records})
        self._appender.append(encode(records))
        self._ring()

    def consumer(self, group: str, topics: Sequence[str], *, window: int = 4096) -> KafkaMember:
        self._check(topics)
        member = KafkaMember(
            self._cluster,
            group,
            topics,
            window,
            self._slot,
            lags=self.lag,
            check=self._check,
            ring=self._ring,
        )
        self._members.append(member)
        return member

    def read(self, topics: Sequence[str], since: float) -> Generator[Record, None, None]:
        return replay(self._cluster, topics, since)

    def follow(self, topics: Sequence[str], since: float) -> KafkaFollower:
        return KafkaFollower(self._cluster, topics, since)

    def lag(self, group: str, topics: Sequence[str]) -> dict[str, Lag]:
        return lag_of(self._cluster, group, topics)

    def trim(self, retention_s: dict[str, float]) -> int:
        return trim(self._cluster, retention_s)

    def close(self) -> None:
        while self._members:
            self._members.pop().close()
        self._appender.close()

    def _check(self, topics: Iterable[str]) -> None:
        """Raises PipelineError for a topic that is not declared, or not there."""
        for topic in topics:
            check_declared(topic)
        if unknown := set(topics) - self._known:
            self._cluster.partitions(unknown)
            self._known |= unknown


def cluster_at(url: str, settings: KafkaSettings | None = None) -> Cluster:
    """`kafka://host:port,host:port`, with ?prefix= where several installations share a cluster.

    Raises PipelineError. Users and passwords are settings: an address is shown in messages and logs.
    """
    parts = urlsplit(url)
    servers = tuple(parts.netloc.split(","))
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = options.pop("prefix", "")
    if "@" in parts.netloc:
        raise PipelineError(
            "settings_invalid",
            "The address of a Kafka cluster must have no user in it: set HEADRACE_KAFKA__USERNAME and "
            "HEADRACE_KAFKA__PASSWORD.",
        )
    if (
        parts.scheme != "kafka"
        or not all(SERVER.fullmatch(server) for server in servers)
        or parts.path not in ("", "/")
        or options
        or not PREFIX.fullmatch(prefix)
    ):
        raise PipelineError(
            "settings_invalid",
            f"The address of a Kafka cluster must be kafka://host:port,host:port, with ?prefix= of "
            f"letters, digits, dots, dashes and underscores where wanted; got {url!r}.",
        )
    return Cluster(servers, prefix, settings or KafkaSettings())
