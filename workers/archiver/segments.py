"""Records on their way to the lake: a segment of a partition at a time, and what its records say. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from infra.eventlog import Position
from schemas.fields import END_OF_TIME
from schemas.jobs import JOB_ID, TENANT
from schemas.results import Outcome, decode_outcome

OVERHEAD_BYTES = 512
"""What a record costs in memory besides its value."""

INT64 = range(-(2**63), 2**63)


class Entry(NamedTuple):
    position: Position
    value: bytes


class Limits(NamedTuple):
    """When a segment is large or old enough to be written; see ArchiverSettings."""

    records: int
    size_bytes: int
    age_s: float


class Segment:
    """Successive records of one partition; never empty. opened_at: by the caller's clock.
    until: where it must end, because an earlier life began to write it; None if that is not known yet."""

    def __init__(self, entries: list[Entry], opened_at: float) -> None:
        self.entries = entries
        self.opened_at = opened_at
        self.size_bytes = sum(map(_cost, entries))
        self.until: int | None = None

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.size_bytes += _cost(entry)

    @property
    def first(self) -> Position:
        return self.entries[0].position

    @property
    def last(self) -> Position:
        return self.entries[-1].position

    @property
    def positions(self) -> list[Position]:
        return [entry.position for entry in self.entries]

    @property
    def mark(self) -> str:
        """Of the first record: another log may give the same positions to other records."""
        return hashlib.blake2b(self.entries[0].value, digest_size=4).hexdigest()

    @property
    def claim(self) -> str:
        """Names a segment of which the end is not fixed yet."""
        return f"{self.first.partition}-{self.first.offset}-{self.mark}"

    @property
    def name(self) -> str:
        return f"{self.first.partition}-{self.first.offset}-{self.last.offset}-{self.mark}"

    def is_due(self, limits: Limits, now: float) -> bool:
        if self.until is not None:
            return self.last.offset >= self.until
        # By the span, not the number: what lies between two records takes room in the log's window too.
        return (
            self.last.offset - self.first.offset + 1 >= limits.records
            or self.size_bytes >= limits.size_bytes
            or now - self.opened_at >= limits.age_s
        )

    def cut(self, until: int) -> tuple[Segment, Segment | None]:
        """What goes up to this offset, and what comes after it."""
        head = [entry for entry in self.entries if entry.position.offset <= until]
        rest = self.entries[len(head) :]
        return Segment(head, self.opened_at), Segment(rest, self.opened_at) if rest else None


def partition_of(key: str) -> str:
    """Of the object that a segment's claim or name is the name of."""
    return key.rpartition("/")[2].partition("-")[0]


class Unreadable(Exception):
    """A record that is no outcome. The message says why, and nothing of what is in it."""


def read_outcome(value: bytes) -> Outcome:
    """Raises Unreadable."""
    try:
        outcome = decode_outcome(value)
        bytes(outcome.answer).decode()
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise Unreadable(f"expected the JSON of an outcome, came other: {error}") from None
    for fault in _faults(outcome):
        raise Unreadable(fault)
    return outcome


def _faults(outcome: Outcome) -> Iterator[str]:
    """What would not fit in a row, or not in the name of a file."""
    times = (outcome.submitted_at, outcome.finished_at or 0.0)
    numbers = (outcome.version or 0, outcome.attempts, outcome.ref.size_bytes if outcome.ref else 0)
    if not outcome.ended:
        yield f"expected a job that ended, came one that is {outcome.status}"
    if not JOB_ID.fullmatch(outcome.job_id):
        yield "expected a job id"
    if not TENANT.fullmatch(outcome.tenant):
        yield "expected a tenant's name"
    if not all(0 <= when < END_OF_TIME for when in times):
        yield "expected times between 1970 and 9999"
    if not all(number in INT64 for number in numbers):
        yield "expected whole numbers of at most 64 bits"


def _cost(entry: Entry) -> int:
    return len(entry.value) + OVERHEAD_BYTES
