"""The event log's contract. What is appended is accepted; what is completed is answered.

Positions are opaque above this package: no offset, transaction or SQL shows through.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, Protocol


class NewRecord(NamedTuple):
    """A record to be appended. headers: text only, as in the CloudEvents Kafka binding."""

    topic: str
    key: str
    headers: dict[str, str]
    value: bytes


class Position(NamedTuple):
    """Where a record lies. Opaque to callers: only compared and handed back."""

    topic: str
    partition: int
    offset: int


class Record(NamedTuple):
    """A record as read. time: seconds since the epoch, by the log's clock when it was appended."""

    position: Position
    key: str
    headers: dict[str, str]
    value: bytes
    time: float


class Lag(NamedTuple):
    """How far a group is behind on one topic. open: at most so many, and 0 only if none; where a log counts
    by offsets, the ends of transactions count too. oldest_age_s: age of the oldest open record, 0 if none."""

    open: int
    oldest_age_s: float


class Consumer(Protocol):
    """One member of a consumer group. Owned by one thread.

    On a log whose topics have partitions, what is said of a topic (order, window) holds for each partition,
    and the members of a group share them.
    """

    def receive(self, max_records: int, max_bytes: int, timeout_s: float = 0) -> list[Record]:
        """Records not yet given to this member, oldest first per topic, paused topics left out.

        Never more than max_records or (but for a first, larger record) max_bytes of values.
        A topic whose window of open records is full gives nothing until some complete.
        What it returns is this member's now, also where `lost()` names the same positions: then they were
        lost, and came back.
        Raises Fenced once it shows that another member has taken over.
        """

    def complete(self, positions: Iterable[Position], outputs: Sequence[NewRecord] = ()) -> None:
        """Answer these records and append the outputs: all of it or nothing.

        Raises Fenced if another member has taken over; then nothing was written.
        Positions already complete are ignored.
        """

    def pause(self, topic: str) -> None: ...

    def resume(self, topic: str) -> None: ...

    def lost(self) -> list[Position]:
        """Received positions that changed owner since the last call: forget them."""

    def gained(self) -> bool:
        """Whether this member became the owner of something since the last call: records of earlier owners
        may come, and what those wrote can be read. True at first. Asked after `receive`, and before
        what it gave is used."""

    def lag(self) -> dict[str, Lag]:
        """Per subscribed topic, what this group has not completed."""

    def rewind(self, since: float) -> None:
        """Give again everything of this member's appended at or after this time, completed or not (replay)."""

    def close(self) -> None: ...


class Follower(Protocol):
    """Reads topics on and on, by no group: every follower is given everything. Owned by one thread."""

    def receive(self) -> list[Record]:
        """What came since the last call, as far as it can be had without waiting."""

    def close(self) -> None: ...


class EventLog(Protocol):
    def append(self, records: Sequence[NewRecord]) -> None:
        """Append all or nothing; durable on return. Raises Transient (log_unavailable, log_full, log_busy);
        where the log is on other machines, some may then be there all the same: append them again."""

    def consumer(self, group: str, topics: Sequence[str], *, window: int = 4096) -> Consumer:
        """Join a group. window: most open records per topic."""

    def read(self, topics: Sequence[str], since: float) -> Generator[Record, None, None]:
        """Every record of these topics appended at or after a time, up to now, by no group. Oldest first per topic.
        Close it if it is not read to its end."""

    def follow(self, topics: Sequence[str], since: float) -> Follower:
        """From the first records appended at or after a time, for as long as the follower lives."""

    def lag(self, group: str, topics: Sequence[str]) -> dict[str, Lag]:
        """Lag of a group as seen from outside it."""

    def trim(self, retention_s: dict[str, float]) -> int:
        """Delete records older than their topic's retention that no known group still has open. Returns how many."""

    def close(self) -> None: ...


class Fenced(Exception):
    """Another member took over the group: this one must stop and start anew."""


class Moved(Fenced):
    """Some of these positions are another member's now. Forget what `lost()` returns, complete the others;
    a member that cannot do so may stop and start anew."""
