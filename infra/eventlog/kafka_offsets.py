"""What is done with topics from outside any group: read on from a time, measure groups, delete what is old."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import OffsetSpec
from kafka.structs import OffsetAndMetadata

from infra.eventlog import Lag, Record
from infra.eventlog.kafka_cluster import ANSWER_S, Cluster, committed, kafka_trouble
from infra.eventlog.kafka_records import decode, timestamp
from infra.eventlog.tracker import Tracker
from schemas.errors import PipelineError, Transient

POLL_MS = 500
NOTHING_COMES_S = 3 * ANSWER_S
"""How long to wait where a transaction is open. Longer than one may be."""

FIRST_BYTES = 16 * 1024
"""What is fetched of a partition to see one record."""

Offsets = dict[TopicPartition, int]


def replay(cluster: Cluster, topics: Sequence[str], since: float) -> Generator[Record, None, None]:
    """Each topic's records from a time on, up to what was there at the call."""
    by_topic = cluster.partitions(topics)
    every = _all(by_topic.values())
    with kafka_trouble(), closing(cluster.admin()) as admin:
        # With what transactions have written that are only just committed: the reader waits for their end.
        ends = _offsets(admin, dict.fromkeys(every, OffsetSpec.LATEST))
        starts = _offsets(admin, dict.fromkeys(every, timestamp(since)))
    for partition in [p for p, start in starts.items() if not 0 <= start < ends[p]]:
        del starts[partition]
    return _read(cluster, [by_topic[topic] for topic in topics], starts, ends, since)


class KafkaFollower:
    """Of every partition, from a time on. A partition with nothing since then is followed from its end."""

    def __init__(self, cluster: Cluster, topics: Sequence[str], since: float) -> None:
        every = _all(cluster.partitions(topics).values())
        self._cluster = cluster
        with kafka_trouble(), closing(cluster.admin()) as admin:
            ends = _offsets(admin, dict.fromkeys(every, OffsetSpec.LATEST))
            starts = _offsets(admin, dict.fromkeys(every, timestamp(since)))
        self._consumer = cluster.consumer()
        self._consumer.assign(every)
        for partition, start in starts.items():
            self._consumer.seek(partition, ends[partition] if start < 0 else start)

    def receive(self) -> list[Record]:
        with kafka_trouble():
            found = self._consumer.poll(timeout_ms=0)
        return [
            decode(self._cluster.topic(partition.topic), record)
            for partition, records in found.items()
            for record in records
        ]

    def close(self) -> None:
        self._consumer.close(timeout_ms=1000)


def first_since(cluster: Cluster, partitions: Sequence[TopicPartition], since: float) -> Offsets:
    """The lowest offset appended at or after a time; partitions without one are left out."""
    with kafka_trouble(), closing(cluster.admin()) as admin:
        found = _offsets(admin, dict.fromkeys(partitions, timestamp(since)))
    return {partition: offset for partition, offset in found.items() if offset >= 0}


def lag_of(cluster: Cluster, group: str, topics: Sequence[str]) -> dict[str, Lag]:
    """By arithmetic on offsets, so at most too high: the ends of transactions have offsets too."""
    by_topic = cluster.partitions(topics)
    every = _all(by_topic.values())
    reader = cluster.consumer(
        group_id=cluster.name(group), max_partition_fetch_bytes=FIRST_BYTES, fetch_max_wait_ms=50
    )
    with kafka_trouble(), closing(reader):
        starts = reader.beginning_offsets(every)
        ends = reader.end_offsets(every)
        trackers = {p: Tracker(starts[p]) for p in every}
        for partition, at in committed(reader, every).items():
            trackers[partition] = read_tracker(group, partition, at)
            if at.offset < starts[partition]:  # retention has deleted under it
                trackers[partition].received(starts[partition])
        behind = {p: tracker.next for p, tracker in trackers.items() if tracker.next < ends[p]}
        oldest = _first_times(reader, behind, ends)
    now = time.time()
    return {
        topic: Lag(
            sum(
                ends[p] - trackers[p].next - trackers[p].complete_above_next
                for p in partitions
                if p in oldest
            ),
            max((max(0.0, now - oldest[p]) for p in partitions if p in oldest), default=0.0),
        )
        for topic, partitions in by_topic.items()
    }


def trim(cluster: Cluster, retention_s: dict[str, float]) -> int:
    """Delete what is older and what no group has open. The cluster's own retention does so too, but by whole
    files, and without asking groups. Returns how many offsets went, 0 where this user may not delete.
    """
    by_topic = cluster.partitions(retention_s)
    every = _all(by_topic.values())
    now = time.time()
    with kafka_trouble(), closing(cluster.admin()) as admin:
        starts = _offsets(admin, dict.fromkeys(every, OffsetSpec.EARLIEST))
        cuts = _offsets(admin, dict.fromkeys(every, OffsetSpec.LATEST))
        ages = {p: timestamp(now - retention_s[t]) for t, parts in by_topic.items() for p in parts}
        for bounds in (_offsets(admin, ages), _open_to_groups(admin)):
            cuts = {
                p: min(cut, bounds[p]) if bounds.get(p, -1) >= 0 else cut for p, cut in cuts.items()
            }
        going = {p: cut for p, cut in cuts.items() if cut > starts[p]}
        try:
            if going:
                admin.delete_records(going)
        except (kafka_errors.AuthorizationError, kafka_errors.PolicyViolationError):
            return 0
    return sum(cut - starts[p] for p, cut in going.items())


def read_tracker(group: str, partition: TopicPartition, at: OffsetAndMetadata) -> Tracker:
    """From what a group has committed. Raises PipelineError for metadata that is not ours."""
    try:
        return Tracker.decode(at.offset, at.metadata or "")
    except ValueError as error:
        raise PipelineError(
            "log_corrupt",
            f"What group {group!r} has committed for {partition.topic}/{partition.partition} is damaged "
            f"({error}): commit offset {at.offset} there again, without metadata.",
        ) from error


def _read(
    cluster: Cluster,
    by_topic: list[list[TopicPartition]],
    starts: Offsets,
    ends: Offsets,
    since: float,
) -> Generator[Record, None, None]:
    consumer = None
    try:
        for partitions in by_topic:
            span = {p: starts[p] for p in partitions if p in starts}
            if not span:
                continue
            consumer = consumer or cluster.consumer()
            for found in _scan(consumer, span, ends):
                record = decode(cluster.topic(found.topic), found)
                if record.time >= since:
                    yield record
    finally:
        if consumer is not None:
            consumer.close(timeout_ms=1000)


def _first_times(consumer: Any, starts: Offsets, ends: Offsets) -> dict[TopicPartition, float]:
    """When the first record at or after each start was appended; without those where only markers follow."""
    times: dict[TopicPartition, float] = {}
    for found in _scan(consumer, starts, ends, one_each=True):
        times[TopicPartition(found.topic, found.partition)] = found.timestamp / 1000
    return times


def _scan(
    consumer: Any, starts: Offsets, ends: Offsets, *, one_each: bool = False
) -> Iterator[Any]:
    """What lies in these spans, as the client library gives it. one_each: only the first of each partition."""
    left = set(starts)
    if not left:
        return
    consumer.assign(sorted(left))
    for partition, start in starts.items():
        consumer.seek(partition, start)
    deadline = time.monotonic() + NOTHING_COMES_S
    while left:
        with kafka_trouble():
            batches = consumer.poll(timeout_ms=POLL_MS)
        for partition, batch in batches.items():
            deadline = time.monotonic() + NOTHING_COMES_S
            yield from (batch[:1] if one_each else (r for r in batch if r.offset < ends[partition]))
        with kafka_trouble():
            over = {p for p in left if _position(consumer, p) >= ends[p]}
            over |= batches.keys() if one_each else set()
            consumer.pause(*(over & left))
        left -= over
        if left and time.monotonic() > deadline:
            raise Transient(
                "log_unavailable",
                f"Nothing could be read of {sorted(left)[0]} for {NOTHING_COMES_S:g} s: a transaction "
                f"may be open there, or its broker down.",
            )


def _position(consumer: Any, partition: TopicPartition) -> int:
    """Where it would read on, past what is no record; -1 while that is being looked up."""
    position: int | None = consumer.position(partition, timeout_ms=POLL_MS)
    return -1 if position is None else position


def _open_to_groups(admin: Any) -> Offsets:
    """The lowest offset that any group has open, of partitions that groups read."""
    lowest: Offsets = {}
    groups = [group["group_id"] for group in admin.list_groups()]
    for offsets in admin.list_group_offsets(groups).values() if groups else []:
        for partition, at in offsets.items():
            if at.offset >= 0:
                lowest[partition] = min(at.offset, lowest.get(partition, at.offset))
    return lowest


def _offsets(admin: Any, wanted: dict[TopicPartition, Any]) -> Offsets:
    """-1 where there is no record as young as wanted."""
    found = admin.list_partition_offsets(wanted) if wanted else {}
    return {partition: at.offset for partition, at in found.items()}


def _all(groups: Iterable[list[TopicPartition]]) -> list[TopicPartition]:
    return [partition for group in groups for partition in group]
