"""Records as Kafka holds them: written by us, or by anybody else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from infra.eventlog import NewRecord, Position, Record
from infra.eventlog.kafka_cluster import MAX_RECORD_BYTES
from schemas.errors import InvalidJob

FRAME_BYTES = 128
"""More than a batch of one record adds to it; and for each header, more than its lengths take."""
HEADER_FRAME_BYTES = 16


class Encoded(NamedTuple):
    """A record ready to be sent."""

    topic: str
    key: bytes
    headers: list[tuple[str, bytes]]
    value: bytes


def encode(records: Sequence[NewRecord]) -> list[Encoded]:
    """Raises InvalidJob for a record that cannot be kept: before any of them is sent."""
    return [_encode(record) for record in records]


def _encode(record: NewRecord) -> Encoded:
    topic, key, headers, value = record
    try:
        encoded = Encoded(
            topic,
            key.encode(),
            [(_checked(name), text.encode()) for name, text in headers.items()],
            value,
        )
    except UnicodeEncodeError as error:
        raise InvalidJob(
            "invalid_text",
            f"The key and headers of a record on {topic!r} must be Unicode text; "
            f"{error.object[error.start : error.end]!a} is half of a surrogate pair: "
            f"decode the text where it comes from.",
        ) from None
    if (size := _size(encoded)) > MAX_RECORD_BYTES:
        raise InvalidJob(
            "record_too_large",
            f"A record on {topic!r} may have {MAX_RECORD_BYTES} bytes with its headers, this one has "
            f"{size}: send large payloads by reference.",
        )
    return encoded


def _checked(name: str) -> str:
    name.encode()
    return name


def _size(record: Encoded) -> int:
    headers = sum(
        len(name.encode()) + len(text) + HEADER_FRAME_BYTES for name, text in record.headers
    )
    return len(record.key) + headers + len(record.value) + FRAME_BYTES


def decode(topic: str, found: Any) -> Record:
    """found: the client library's. What a foreign producer wrote that is no text becomes text with marks in it."""
    return Record(
        Position(topic, found.partition, found.offset),
        _text(found.key),
        {name: _text(value) for name, value in found.headers},
        found.value or b"",
        found.timestamp / 1000,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def timestamp(at: float) -> int:
    """The first of Kafka's milliseconds that is not before this time. Rounded: 1.001 * 1000 is less than 1001."""
    return max(0, math.ceil(round(at * 1000, 3)))
