"""One member of a consumer group on Kafka: which partitions it has, what it was given, what it has completed.

The group deals out partitions; completions and outputs go in one transaction that the cluster refuses to
whoever is no longer a member. All of it happens in the thread that owns the member, inside its calls.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import MemberState, OffsetAndMetadata

from infra.eventlog import Fenced, Lag, Moved, NewRecord, Position, Record
from infra.eventlog.kafka_cluster import ANSWER_S, Cluster, committed, kafka_trouble
from infra.eventlog.kafka_offsets import first_since, read_tracker
from infra.eventlog.kafka_partition import Partition
from infra.eventlog.kafka_producers import StaleMember, Transactions
from infra.eventlog.kafka_records import decode, encode
from infra.eventlog.tracker import Tracker
from schemas.errors import Transient

FETCH_BYTES = 64 * 1024
"""Of one partition at a time: with many partitions, what was fetched ahead must stay small."""

EVERYTHING = 2**31
"""Each poll takes all that was fetched. The client forgets what it has left of a partition that is paused."""

FETCH_ALL_BYTES = 8 * 1024 * 1024
FETCH_WAIT_MS = 50
"""A broker answers one fetch at a time, and a partition that was not in it has to wait for its end."""

PAUSE_LEAST_S, PAUSE_MOST_S = 0.001, 0.02
"""Between two looks at what has come, twice as long each time."""

HEARTBEAT_S = 1.0
STALLED_S = 60.0
"""A member that does not come back for so long is dealt out of the group."""

AGAIN_S = 0.05
JOIN_S = 0.5
"""How long one call waits for the other members to come to a new deal."""

Lags = Callable[[str, Sequence[str]], dict[str, Lag]]


class KafkaMember:
    """lags: how the log computes the lag of a group. check: raises for a topic that is not there.
    ring: called after outputs were appended."""

    def __init__(
        self,
        cluster: Cluster,
        group: str,
        topics: Sequence[str],
        window: int,
        slot: int,
        *,
        lags: Lags,
        check: Callable[[Iterable[str]], None],
        ring: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._group = group
        self._topics = list(topics)
        self._window = window
        self._lags = lags
        self._check = check
        self._ring = ring
        self._owned: dict[TopicPartition, Partition] = {}
        self._paused: set[str] = set()
        self._lost: list[Position] = []
        self._gained = False
        self._turns = itertools.count(1)
        self._fenced: Fenced | None = None
        # In this order: once the slot's transactions are ours, no earlier owner can change what we read.
        self._transactions = Transactions(cluster, f"{cluster.name(group)}.{slot}")
        try:
            self._consumer = self._enter(slot)
        except BaseException:
            self._transactions.close()
            raise

    # ── the contract ─────────────────────────────────────────────────────────────────────────────

    def receive(self, max_records: int, max_bytes: int, timeout_s: float = 0) -> list[Record]:
        deadline = time.monotonic() + timeout_s
        pause_s = PAUSE_LEAST_S
        while True:
            self._fetch()
            records = self._give(max_records, max_bytes)
            left_s = deadline - time.monotonic()
            if records or left_s <= 0:
                return records
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, PAUSE_MOST_S)

    def complete(self, positions: Iterable[Position], outputs: Sequence[NewRecord] = ()) -> None:
        positions = list(positions)
        self._check({record.topic for record in outputs})
        records = encode(outputs)
        deadline = time.monotonic() + ANSWER_S
        while True:
            trackers = self._with_completed(positions)
            try:
                self._commit(trackers, records)
                break
            except StaleMember:
                if time.monotonic() > deadline:
                    raise Transient(
                        "log_rebalancing",
                        f"The group {self._group!r} has not come to rest for {ANSWER_S:g} s: "
                        f"wait for its members, or look for one that comes and goes.",
                    ) from None
                time.sleep(AGAIN_S)  # it is the heartbeat that learns of the deal
                with kafka_trouble():
                    self._join()
        for partition, tracker in trackers.items():
            self._owned[partition].tracker = tracker
        if records:
            self._ring()

    def pause(self, topic: str) -> None:
        self._set_paused(topic, True)

    def resume(self, topic: str) -> None:
        self._set_paused(topic, False)

    def lost(self) -> list[Position]:
        lost, self._lost = self._lost, []
        return lost

    def gained(self) -> bool:
        gained, self._gained = self._gained, False
        return gained

    def lag(self) -> dict[str, Lag]:
        return self._lags(self._group, self._topics)

    def rewind(self, since: float) -> None:
        starts = first_since(self._cluster, list(self._owned), since)
        trackers = {
            partition: self._owned[partition].tracker.rewound(start)
            for partition, start in starts.items()
        }
        try:
            self._commit(trackers, [])
        except StaleMember:
            raise Transient(
                "log_rebalancing",
                f"The group {self._group!r} is being dealt out anew: rewind once it rests.",
            ) from None
        for partition, tracker in trackers.items():
            self._lost += self._owned[partition].replace(tracker)
            self._consumer.seek(partition, tracker.end)

    def close(self) -> None:
        """The member keeps its partitions for the session's timeout: whoever comes back to its slot finds
        them, and the group need not be dealt out anew for a restart."""
        self._transactions.close()
        with suppress(kafka_errors.KafkaError):
            self._consumer.close(timeout_ms=1000)

    # ── giving ───────────────────────────────────────────────────────────────────────────────────

    def _give(self, max_records: int, max_bytes: int) -> list[Record]:
        """Hand out what waits, partitions in turns. The first record may be larger than max_bytes."""
        records: list[Record] = []
        room_bytes = max_bytes
        ready = [partition for partition in self._owned.values() if partition.ready]
        queue = sorted(ready, key=lambda partition: partition.turn, reverse=True)
        while queue and len(records) < max_records:
            partition = queue.pop()
            size = len(partition.waiting[0].value)
            if records and size > room_bytes:
                break
            if record := partition.give():
                records.append(record)
                room_bytes -= size
                partition.turn = next(self._turns)
            if partition.ready:
                queue.insert(0, partition)
        return records

    def _fetch(self) -> None:
        """Take what has come from the cluster, and do what the group asks for."""
        self._raise_if_fenced()
        with kafka_trouble():
            self._join()
            self._hold_back()
            # Without a timeout: while it waits, the client would answer a new deal by itself. See `_join`.
            found = self._consumer.poll(timeout_ms=0, max_records=EVERYTHING)
            taken = self._follow()
        for name, batch in found.items():
            partition = self._owned.get(name)
            if partition is not None and name not in taken:
                partition.waiting.extend(decode(partition.topic, one) for one in batch)

    def _hold_back(self) -> None:
        """Fetch only for partitions that want it."""
        paused = self._consumer.paused()
        full = {name for name, partition in self._owned.items() if not partition.hungry}
        self._consumer.pause(*(full - paused))
        self._consumer.resume(*(paused & self._owned.keys() - full))

    def _set_paused(self, topic: str, paused: bool) -> None:
        (self._paused.add if paused else self._paused.discard)(topic)
        for partition in self._owned.values():
            if partition.topic == topic:
                partition.paused = paused

    # ── completing ───────────────────────────────────────────────────────────────────────────────

    def _with_completed(self, positions: Sequence[Position]) -> dict[TopicPartition, Tracker]:
        """Copies of the trackers these positions touch, with them completed."""
        self._raise_if_fenced()
        if moved := set(self._lost).intersection(positions):
            raise Moved(
                f"{len(moved)} of {len(positions)} positions are another member's now: forget what "
                f"`lost()` returns, and complete the others."
            )
        trackers: dict[TopicPartition, Tracker] = {}
        for topic, number, offset in positions:
            name = TopicPartition(self._cluster.name(topic), number)
            if name not in self._owned:
                raise ValueError(f"offset {offset} of {name} was never received: it is not ours")
            if name not in trackers:
                trackers[name] = self._owned[name].tracker.copy()
            trackers[name].complete(offset)
        return trackers

    def _commit(self, trackers: dict[TopicPartition, Tracker], records: list[Any]) -> None:
        if not trackers and not records:
            return
        offsets = {name: _offset(tracker) for name, tracker in trackers.items()}
        try:
            self._transactions.run(records, offsets, self._membership)
        except Fenced as fenced:
            self._fence(fenced)

    def _fence(self, fenced: Fenced) -> None:
        """This member is at its end: all that it had is another's."""
        self._fenced = fenced
        for partition in self._owned.values():
            self._lost += partition.open_positions()
        self._owned.clear()
        raise fenced

    def _raise_if_fenced(self) -> None:
        if self._fenced is not None:
            raise self._fenced

    # ── the group ────────────────────────────────────────────────────────────────────────────────

    def _enter(self, slot: int) -> Any:
        """Join the group and wait for what it deals to us. A slot's earlier owner is put out at once."""
        settings = self._cluster.settings
        consumer = self._consumer = self._cluster.consumer(
            group_id=self._cluster.name(self._group),
            group_instance_id=f"slot-{slot}",
            session_timeout_ms=int(settings.session_timeout_s * 1000),
            heartbeat_interval_ms=int(HEARTBEAT_S * 1000),
            max_poll_interval_ms=int(STALLED_S * 1000),
            max_partition_fetch_bytes=FETCH_BYTES,
            fetch_max_bytes=FETCH_ALL_BYTES,
            fetch_max_wait_ms=FETCH_WAIT_MS,
        )
        try:
            with kafka_trouble():
                self._membership = consumer.group_metadata()
                consumer.subscribe([self._cluster.name(topic) for topic in self._topics])
                # A leader that knows no topics yet deals out nothing, and then all again and again.
                consumer.topics()
                deadline = time.monotonic() + ANSWER_S
                while self._membership.member_id == "" and time.monotonic() < deadline:
                    self._join()
        except BaseException:
            consumer.close(timeout_ms=1000)
            raise
        return consumer

    def _join(self) -> None:
        """Take part in a new deal, if one is called for.

        Not left to `poll`: with a short timeout it throws away an answer that comes between two calls, and
        asks for another deal.
        """
        coordinator = self._consumer._coordinator
        try:
            if coordinator.need_rejoin():
                coordinator.poll(timeout_ms=int(JOIN_S * 1000))
            self._follow()
        except kafka_errors.FencedInstanceIdError as error:
            self._put_out(error)

    def _put_out(self, error: Exception | None = None) -> None:
        fenced = Fenced(
            f"Another process has this member's slot in the group {self._group!r}: this one must stop."
        )
        fenced.__cause__ = error
        self._fence(fenced)

    def _follow(self) -> set[TopicPartition]:
        """Take over what a new deal gave us, give up what it took. Returns the partitions that begin anew."""
        member = self._consumer.group_metadata()
        if member.state != MemberState.STABLE:
            return set()
        if not self._consumer._coordinator._heartbeat_enabled:
            self._put_out()  # the client notices, and says nothing
        if member == self._membership:
            return set()
        assigned = self._consumer.assignment()
        # Of two successive deals we know both: what we had and have was never another's. What is in flight
        # there is not redelivered, so its tracker must stay. Across a gap, another may have owned it between.
        kept: set[TopicPartition] = set()
        if member.generation_id == self._membership.generation_id + 1:
            kept = assigned & self._owned.keys()
        try:
            restored = self._restore(assigned - kept)
        except (kafka_errors.CommitFailedError, kafka_errors.RebalanceInProgressError):
            return set()  # there is yet another deal
        for name in self._owned.keys() - kept:
            self._lost += self._owned.pop(name).open_positions()
        for name, tracker in restored.items():
            topic = self._cluster.topic(name.topic)
            partition = Partition(topic, name.partition, tracker, self._window)
            partition.paused = topic in self._paused
            self._owned[name] = partition
            self._consumer.seek(name, tracker.end)
        self._share_windows()
        # Kept for the transactions: what the client says between two deals would be taken for the next one.
        self._membership = member
        self._gained = self._gained or bool(restored)
        return set(restored)

    def _share_windows(self) -> None:
        """A topic's window is divided among its partitions that are ours."""
        counts = Counter(partition.topic for partition in self._owned.values())
        for partition in self._owned.values():
            partition.window = max(1, self._window // counts[partition.topic])

    def _restore(self, partitions: set[TopicPartition]) -> dict[TopicPartition, Tracker]:
        """Where the group stands on these. Where it has not been yet, it stands at the beginning from now on."""
        found = committed(self._consumer, list(partitions))
        trackers = {name: read_tracker(self._group, name, at) for name, at in found.items()}
        new = self._consumer.beginning_offsets(list(partitions - found.keys()))
        begun = {name: Tracker(offset) for name, offset in new.items()}
        if begun:
            self._consumer.commit({name: _offset(tracker) for name, tracker in begun.items()})
        return trackers | begun


def _offset(tracker: Tracker) -> OffsetAndMetadata:
    return OffsetAndMetadata(*tracker.encode(), -1)
