"""The archiver's story: receive outcomes, gather them in segments, write those that are due, complete them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from infra.eventlog import Consumer, Moved
from infra.logs import get_logger
from workers.archiver.archive import Archive
from workers.archiver.segments import Entry, Limits, Segment

RECEIVE_RECORDS = 1000
RECEIVE_BYTES = 4 * 1024 * 1024
RECEIVE_S = 0.5

logger = get_logger("archiver")


class Archiver:
    """join: become a member of the group anew; what is open comes again then.
    memory_bytes: most of all segments together, but for what one receive may add.
    alive: called now and then in the middle of a long write."""

    def __init__(
        self,
        join: Callable[[], Consumer],
        archive: Archive,
        limits: Limits,
        memory_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._join = join
        self._archive = archive
        self._limits = limits
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._alive = alive
        self._consumer: Consumer | None = join()
        self._segments: dict[int, Segment] = {}

    @property
    def pending(self) -> int:
        """How many records are gathered and not written."""
        return sum(len(segment.entries) for segment in self._segments.values())

    @property
    def counts(self) -> Counter[str]:
        """Rows archived, records rejected."""
        return self._archive.counts

    @property
    def drainable(self) -> bool:
        """Whether draining has something left to write."""
        return bool(self._due(everything=True))

    def step(self, *, draining: bool = False) -> None:
        """Raises Transient when the log or the lake cannot be had now, and Fenced when it is over."""
        if not draining:
            self._receive()
        for segment in self._due(everything=draining):
            try:
                self._write(segment)
            except Moved:
                self._start_anew()
                return

    def close(self) -> None:
        if self._consumer:
            self._consumer.close()
        self._archive.close()

    @property
    def _member(self) -> Consumer:
        """This archiver in its group; joins where it has left."""
        if self._consumer is None:
            self._consumer = self._join()
        return self._consumer

    def _receive(self) -> None:
        records = self._member.receive(self._room, RECEIVE_BYTES, RECEIVE_S)
        if self._member.lost():
            self._start_anew()
            return
        for record in records:
            entry = Entry(record.position, record.value)
            if segment := self._segments.get(record.position.partition):
                segment.add(entry)
            else:
                self._segments[record.position.partition] = Segment([entry], self._clock())

    @property
    def _room(self) -> int:
        """A full memory takes no more, unless that would be for ever."""
        waiting = any(segment.until is not None for segment in self._segments.values())
        return RECEIVE_RECORDS if waiting or not self._full else 0

    @property
    def _full(self) -> bool:
        return sum(s.size_bytes for s in self._segments.values()) >= self._memory_bytes

    def _due(self, *, everything: bool) -> list[Segment]:
        now = self._clock()
        segments = list(self._segments.values())
        if everything:
            return [s for s in segments if s.until is None or s.is_due(self._limits, now)]
        due = [segment for segment in segments if segment.is_due(self._limits, now)]
        if self._full and not due:
            unclaimed = [segment for segment in segments if segment.until is None]
            due = sorted(unclaimed, key=lambda segment: segment.size_bytes)[-1:]
        return due

    def _write(self, segment: Segment) -> None:
        """Write what lies before the segment's end, and go on gathering after it."""
        segment.until = self._archive.claim(segment)
        if segment.last.offset < segment.until:
            return  # an earlier life claimed more than has come yet
        whole, rest = segment.cut(segment.until)
        self._archive.store(whole, self._stay)
        self._member.complete(whole.positions)
        if rest:
            self._segments[whole.first.partition] = rest
        else:
            del self._segments[whole.first.partition]

    def _stay(self) -> None:
        """Show the group that this member lives: receiving nothing is enough."""
        self._member.receive(0, 0)
        self._alive()

    def _start_anew(self) -> None:
        """Something has another owner. Which of what we hold is not worth finding out: all that is open
        comes again to whoever owns it, and is written as it was or would have been."""
        logger.info("partitions_moved", action="takes up anew what it has now")
        self._segments.clear()
        self._member.close()
        self._consumer = None
