"""One consumer group's member on the embedded log: what it was given, and what it has completed.

Topics have one partition. A newer member of the group raises the group's epoch, which fences this one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from infra.eventlog import Fenced, Lag, NewRecord, Position, Record
from infra.eventlog.sqlite_file import SqliteFile
from infra.eventlog.sqlite_records import first_since, heads, insert, select, table, to_rows
from infra.eventlog.tracker import Tracker
from schemas.errors import PipelineError

POLL_S = 0.002

Lags = Callable[[str, Sequence[str]], dict[str, Lag]]


class Subscription:
    """One topic of a consumer. head: the topic's highest offset when it was last looked up."""

    def __init__(self, topic: str, tracker: Tracker, window: int) -> None:
        self.topic = topic
        self.tracker = tracker
        self.window = window
        self.head = 0
        self.paused = False

    @property
    def room(self) -> int:
        """How many more records may be open."""
        return self.window - self.tracker.open

    @property
    def ready(self) -> bool:
        tracker = self.tracker
        unread = tracker.end <= self.head
        return unread and not self.paused and self.room > 0 and tracker.accepts(tracker.end)

    def open_positions(self) -> list[Position]:
        return [Position(self.topic, 0, offset) for offset in self.tracker.open_offsets()]


class Basket:
    """What one `receive` hands out."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.records: list[Record] = []
        self.max_records = max_records
        self.room_bytes = max_bytes

    @property
    def room(self) -> int:
        return self.max_records - len(self.records)

    def fits(self, record: Record) -> bool:
        return len(record.value) <= self.room_bytes or not self.records

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.room_bytes -= len(record.value)


class SqliteConsumer:
    """lags: how the log computes the lag of a group. ring: called after outputs were appended."""

    def __init__(
        self,
        file: SqliteFile,
        group: str,
        topics: Sequence[str],
        window: int,
        *,
        lags: Lags,
        ring: Callable[[], None],
    ) -> None:
        for topic in topics:
            table(topic)
        self._file = file
        self._group = group
        self._lags = lags
        self._ring = ring
        self._lost: list[Position] = []
        self._gained = True
        self._seen_version = -1
        self._connection = file.connect(for_outcomes=True)
        try:
            self._epoch, trackers = self._join(topics)
        except BaseException:
            self._connection.close()
            raise
        self._subscriptions = {
            topic: Subscription(topic, tracker, window) for topic, tracker in trackers.items()
        }
        self._turns = list(self._subscriptions.values())

    def receive(self, max_records: int, max_bytes: int, timeout_s: float = 0) -> list[Record]:
        deadline = time.monotonic() + timeout_s
        while True:
            records = self._take(max_records, max_bytes)
            remaining_s = deadline - time.monotonic()
            if records or remaining_s <= 0:
                return records
            time.sleep(min(POLL_S, remaining_s))

    def complete(self, positions: Iterable[Position], outputs: Sequence[NewRecord] = ()) -> None:
        rows = to_rows(outputs)
        with self._file.transaction(self._connection):
            self._check_owner()
            trackers = self._with_completed(positions)
            insert(self._connection, rows)
            self._store(trackers)
        for topic, tracker in trackers.items():
            self._subscriptions[topic].tracker = tracker
        if rows:
            self._look_again()
            self._ring()

    def pause(self, topic: str) -> None:
        self._subscriptions[topic].paused = True

    def resume(self, topic: str) -> None:
        self._subscriptions[topic].paused = False

    def lost(self) -> list[Position]:
        lost, self._lost = self._lost, []
        return lost

    def gained(self) -> bool:
        gained, self._gained = self._gained, False
        return gained

    def lag(self) -> dict[str, Lag]:
        return self._lags(self._group, list(self._subscriptions))

    def rewind(self, since: float) -> None:
        with self._file.transaction(self._connection):
            self._check_owner()
            trackers = {}
            for topic, subscription in self._subscriptions.items():
                start = first_since(self._file, self._connection, topic, since)
                if start is not None:
                    trackers[topic] = subscription.tracker.rewound(start)
            self._store(trackers)
        for topic, tracker in trackers.items():
            self._replace(self._subscriptions[topic], tracker)

    def close(self) -> None:
        self._connection.close()

    def _join(self, topics: Sequence[str]) -> tuple[int, dict[str, Tracker]]:
        """Raise the group's epoch; returns it, and where the group stands on each topic."""
        connection = self._connection
        with self._file.transaction(connection):
            connection.execute(
                "INSERT INTO groups VALUES (?, 1) ON CONFLICT(grp) DO UPDATE SET epoch = epoch + 1",
                (self._group,),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO cursors VALUES (?, ?, 1, '')",
                [(self._group, topic) for topic in topics],
            )
            cursors = read_cursors(self._file, connection, self._group)
            return self._stored_epoch(), {topic: cursors[topic] for topic in topics}

    def _take(self, max_records: int, max_bytes: int) -> list[Record]:
        basket = Basket(max_records, max_bytes)
        try:
            with self._file.errors():
                self._look_for_news()
                self._fill(basket)
        except PipelineError:
            if not basket.records:  # those are given now; the trouble will show again
                raise
        return basket.records

    def _look_for_news(self) -> None:
        """Find out what is unread, unless nobody has written since the last time."""
        (version,) = self._file.query(self._connection, "PRAGMA data_version").fetchone()
        if version == self._seen_version:
            return
        self._check_owner()
        highest = heads(self._file, self._connection)
        for topic, subscription in self._subscriptions.items():
            subscription.head = highest.get(topic, 0)
        self._seen_version = version

    def _look_again(self) -> None:
        """A connection's data_version does not count its own writes."""
        self._seen_version = -1

    def _fill(self, basket: Basket) -> None:
        """Equal shares of each topic with something unread, then of what those left; least recently served first."""
        ready = [subscription for subscription in self._turns if subscription.ready]
        while ready and basket.room > 0:
            share = -(-basket.room // len(ready))
            going_on = []
            for subscription in ready:
                before = subscription.tracker.end
                if not self._read(subscription, basket, min(share, basket.room)):
                    return
                if subscription.ready and subscription.tracker.end > before:
                    going_on.append(subscription)
            ready = going_on

    def _read(self, subscription: Subscription, basket: Basket, most: int) -> bool:
        """Move records of one topic into the basket. False when the next one does not fit."""
        tracker = subscription.tracker
        most = min(most, subscription.room)
        if most <= 0:
            return True
        held = len(basket.records)
        rows = select(self._file, self._connection, subscription.topic, tracker.end, most)
        try:
            with closing(rows):
                for record in rows:
                    offset = record.position.offset
                    if not tracker.accepts(offset):
                        break
                    if not basket.fits(record):
                        return False
                    if not tracker.received(offset):
                        basket.add(record)
            return True
        finally:
            if len(basket.records) > held:
                self._turns.remove(subscription)
                self._turns.append(subscription)

    def _with_completed(self, positions: Iterable[Position]) -> dict[str, Tracker]:
        """Copies of the trackers these positions touch, with them completed."""
        trackers: dict[str, Tracker] = {}
        for topic, _, offset in positions:
            if topic not in trackers:
                trackers[topic] = self._subscriptions[topic].tracker.copy()
            trackers[topic].complete(offset)
        return trackers

    def _store(self, trackers: dict[str, Tracker]) -> None:
        self._connection.executemany(
            "UPDATE cursors SET next = ?, bitmap = ? WHERE grp = ? AND topic = ?",
            [(*tracker.encode(), self._group, topic) for topic, tracker in trackers.items()],
        )

    def _check_owner(self) -> None:
        if self._stored_epoch() == self._epoch:
            return
        for subscription in self._subscriptions.values():
            self._replace(subscription, Tracker(subscription.tracker.next))
        raise Fenced(
            f"Another member has joined the group {self._group!r}: this one must stop and start anew."
        )

    def _replace(self, subscription: Subscription, tracker: Tracker) -> None:
        self._lost += subscription.open_positions()
        subscription.tracker = tracker

    def _stored_epoch(self) -> int:
        row = self._file.query(
            self._connection, "SELECT epoch FROM groups WHERE grp = ?", (self._group,)
        ).fetchone()
        return int(row[0])


def read_cursors(
    file: SqliteFile, connection: sqlite3.Connection, group: str
) -> dict[str, Tracker]:
    """By topic, how far a group has come; empty for a group nobody has joined."""
    rows = file.query(
        connection, "SELECT topic, next, bitmap FROM cursors WHERE grp = ?", (group,)
    ).fetchall()
    try:
        return {topic: Tracker.decode(next_offset, bitmap) for topic, next_offset, bitmap in rows}
    except ValueError as error:
        raise PipelineError(
            "log_corrupt",
            f"The cursors of group {group!r} in {file.path} are damaged ({error}): "
            f"restore the file from a copy.",
        ) from error
