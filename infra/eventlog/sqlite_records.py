"""Records as rows: how they are written to a topic's table and read back."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Sequence

import msgspec

from infra.eventlog import NewRecord, Position, Record
from infra.eventlog.sqlite_file import SqliteFile, table_name
from schemas.errors import InvalidJob, PipelineError
from schemas.topics import TOPIC_BY_NAME

Rows = dict[str, list[tuple[str, bytes, bytes]]]
"""By topic: key, headers as MessagePack, value."""

_decode_headers = msgspec.msgpack.Decoder(dict[str, str]).decode
_encode_headers = msgspec.msgpack.Encoder().encode


def table(topic: str) -> str:
    """The topic's table, quoted for SQL. Raises PipelineError for a topic that was never declared."""
    if topic not in TOPIC_BY_NAME:
        raise PipelineError(
            "unknown_topic",
            f"The event log has no topic {topic!r}: use one that schemas/topics.py declares.",
        )
    return f'"{table_name(topic)}"'


def to_rows(records: Sequence[NewRecord]) -> Rows:
    """Made before the write lock is taken. Raises PipelineError or InvalidJob for a record that cannot be kept."""
    rows: Rows = {}
    for topic, key, headers, value in records:
        try:
            "".join((key, *headers, *headers.values())).encode()  # text, all of it
        except UnicodeEncodeError as error:
            raise InvalidJob(
                "invalid_text",
                f"The key and headers of a record on {topic!r} must be Unicode text; "
                f"{error.object[error.start : error.end]!a} is half of a surrogate pair: "
                f"decode the text where it comes from.",
            ) from None
        row = (key, _encode_headers(headers), value)
        if topic in rows:
            rows[topic].append(row)
        else:
            table(topic)
            rows[topic] = [row]
    return rows


def insert(connection: sqlite3.Connection, rows: Rows) -> None:
    """Within a transaction: the time is that of the moment the lock was held."""
    now = time.time()
    for topic, topic_rows in rows.items():
        connection.executemany(
            f"INSERT INTO {table(topic)}(time, key, headers, value) VALUES (?, ?, ?, ?)",
            [(now, *row) for row in topic_rows],
        )


def select(
    file: SqliteFile, connection: sqlite3.Connection, topic: str, start: int, most: int
) -> Generator[Record, None, None]:
    """At most so many records from an offset on, one in memory at a time. Close it to end the read."""
    cursor = file.query(
        connection,
        f"SELECT offset, time, key, headers, value FROM {table(topic)} "
        f"WHERE offset >= ? ORDER BY offset LIMIT ?",
        (start, most),
    )
    try:
        for offset, at, key, headers, value in cursor:
            yield Record(Position(topic, 0, offset), key, _decode_headers(headers), value, at)
    finally:
        cursor.close()


def first_since(
    file: SqliteFile, connection: sqlite3.Connection, topic: str, since: float
) -> int | None:
    """The lowest offset appended at or after a time, also where the clock was set back in between."""
    offset: int | None
    (offset,) = file.query(
        connection, f"SELECT min(offset) FROM {table(topic)} WHERE time >= ?", (since,)
    ).fetchone()
    return offset


def heads(file: SqliteFile, connection: sqlite3.Connection) -> dict[str, int]:
    """The highest offset ever given in each topic; topics without a record are left out."""
    rows = file.query(connection, "SELECT name, seq FROM sqlite_sequence").fetchall()
    prefix = len(table_name(""))
    return {name[prefix:]: seq for name, seq in rows}
