"""The embedded event log: one SQLite file shared by every process of one machine.

One table per topic, offsets in the order of commits. An append is one transaction; so is a completion
with its outputs.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import parse_qsl, unquote, urlsplit

from infra.eventlog import Lag, NewRecord, Record
from infra.eventlog.sqlite_consumer import SqliteConsumer, read_cursors
from infra.eventlog.sqlite_file import SqliteFile, Synchronous
from infra.eventlog.sqlite_records import first_since, heads, insert, select, table, to_rows
from infra.eventlog.tracker import Tracker
from schemas.errors import PipelineError

MAX_BYTES = 16 * 1024**3

CHUNK_RECORDS = 256
CHUNK_BYTES = 1024 * 1024
"""What a replay holds in memory, and reads in one go."""

TRIM_RECORDS = 1000
"""What is deleted in one transaction, so that appends get their turn."""


class SqliteFollower:
    """Looks only when somebody has written since the last time."""

    def __init__(self, file: SqliteFile, topics: Sequence[str], since: float) -> None:
        for topic in topics:
            table(topic)
        self._file = file
        self._seen_version = -1
        self._connection = file.connect()
        with file.errors():
            ends = heads(file, self._connection)
            starts = {topic: first_since(file, self._connection, topic, since) for topic in topics}
        self._next = {topic: starts[topic] or ends.get(topic, 0) + 1 for topic in topics}

    def receive(self) -> list[Record]:
        found: list[Record] = []
        with self._file.errors():
            (version,) = self._file.query(self._connection, "PRAGMA data_version").fetchone()
            if version == self._seen_version:
                return found
            for topic, start in self._next.items():
                with closing(
                    select(self._file, self._connection, topic, start, CHUNK_RECORDS)
                ) as records:
                    found += records
            if len(found) < CHUNK_RECORDS:
                self._seen_version = version
        for record in found:
            self._next[record.position.topic] = record.position.offset + 1
        return found

    def close(self) -> None:
        self._connection.close()


class SqliteLog:
    """May be used from several threads; each consumer from one."""

    def __init__(self, file: SqliteFile, on_append: Callable[[], None] | None = None) -> None:
        self._file = file
        self._ring = on_append or (lambda: None)
        self._idle: list[sqlite3.Connection] = []
        with self._connection() as connection:
            file.prepare(connection)

    def append(self, records: Sequence[NewRecord]) -> None:
        rows = to_rows(records)
        if not rows:
            return
        with self._connection() as connection, self._file.transaction(connection):
            insert(connection, rows)
        self._ring()

    def consumer(self, group: str, topics: Sequence[str], *, window: int = 4096) -> SqliteConsumer:
        return SqliteConsumer(self._file, group, topics, window, lags=self.lag, ring=self._ring)

    def read(self, topics: Sequence[str], since: float) -> Generator[Record, None, None]:
        for topic in topics:
            table(topic)
        with self._connection() as connection:
            ends = heads(self._file, connection)
        return self._replay([(topic, ends.get(topic, 0)) for topic in topics], since)

    def follow(self, topics: Sequence[str], since: float) -> SqliteFollower:
        return SqliteFollower(self._file, topics, since)

    def lag(self, group: str, topics: Sequence[str]) -> dict[str, Lag]:
        with self._connection() as connection, self._file.snapshot(connection):
            cursors = read_cursors(self._file, connection, group)
            highest = heads(self._file, connection)
            return {
                topic: self._lag(connection, topic, cursors.get(topic), highest.get(topic, 0))
                for topic in topics
            }

    def trim(self, retention_s: dict[str, float]) -> int:
        trimmed = 0
        with self._connection() as connection:
            for topic, keep_s in retention_s.items():
                cutoff = time.time() - keep_s
                while count := self._trim_chunk(connection, topic, cutoff):
                    trimmed += count
        return trimmed

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One that no other thread is using."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._file.connect()
        try:
            with self._file.errors():
                yield connection
        finally:
            self._idle.append(connection)

    def _replay(self, ends: list[tuple[str, int]], since: float) -> Generator[Record, None, None]:
        for topic, end in ends:
            with self._connection() as connection:
                start = first_since(self._file, connection, topic, since)
            while start is not None and start <= end:
                chunk = self._chunk(topic, start, end)
                if not chunk:
                    break
                start = chunk[-1].position.offset + 1
                yield from (record for record in chunk if record.time >= since)

    def _chunk(self, topic: str, start: int, end: int) -> list[Record]:
        chunk: list[Record] = []
        room_bytes = CHUNK_BYTES
        most = min(CHUNK_RECORDS, end - start + 1)
        with (
            self._connection() as connection,
            closing(select(self._file, connection, topic, start, most)) as records,
        ):
            for record in records:
                chunk.append(record)
                room_bytes -= len(record.value)
                if room_bytes <= 0:
                    break
        return [record for record in chunk if record.position.offset <= end]

    def _lag(
        self, connection: sqlite3.Connection, topic: str, tracker: Tracker | None, head: int
    ) -> Lag:
        """By arithmetic: above a group's `next` nothing is ever deleted, so offsets have no gaps there."""
        tracker = tracker or Tracker(1)
        oldest = self._file.query(
            connection,
            f"SELECT offset, time FROM {table(topic)} WHERE offset >= ? ORDER BY offset LIMIT 1",
            (tracker.next,),
        ).fetchone()
        if oldest is None:
            return Lag(0, 0.0)
        first, at = oldest
        return Lag(head - first + 1 - tracker.complete_above_next, max(0.0, time.time() - at))

    def _trim_chunk(self, connection: sqlite3.Connection, topic: str, cutoff: float) -> int:
        name = table(topic)
        query = self._file.query
        if not query(
            connection, f"SELECT 1 FROM {name} WHERE time < ? LIMIT 1", (cutoff,)
        ).fetchone():
            return 0
        with self._file.transaction(connection):
            (floor,) = query(
                connection, "SELECT min(next) FROM cursors WHERE topic = ?", (topic,)
            ).fetchone()
            below = "" if floor is None else f"WHERE offset < {floor:d}"
            # The plus keeps SQLite off the index by time, which would visit every old record still open.
            return query(
                connection,
                f"DELETE FROM {name} WHERE +time < ? AND offset IN "
                f"(SELECT offset FROM {name} {below} ORDER BY offset LIMIT {TRIM_RECORDS})",
                (cutoff,),
            ).rowcount


def open_sqlite(url: str, on_append: Callable[[], None] | None) -> SqliteLog:
    """`sqlite:///absolute/path`, with synchronous=full to survive power cuts, and max_bytes."""
    parts = urlsplit(url)
    path = Path("/" + unquote(parts.path).lstrip("/"))
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    synchronous = options.pop("synchronous", "normal")
    max_bytes = options.pop("max_bytes", str(MAX_BYTES))
    if (
        parts.netloc
        or path == Path("/")
        or options
        or synchronous not in ("normal", "full")
        or not (max_bytes.isdecimal() and int(max_bytes) >= 1024**2)
    ):
        raise PipelineError(
            "settings_invalid",
            "The embedded event log's address must be sqlite:///absolute/path, with ?synchronous=normal "
            f"or full and max_bytes of at least {1024**2} where wanted; got {url!r}.",
        )
    return SqliteLog(SqliteFile(path, cast(Synchronous, synchronous), int(max_bytes)), on_append)
