"""One partition that a member of a group owns: what was fetched, what is open, what is complete."""

from __future__ import annotations

from collections import deque

from infra.eventlog import Position, Record
from infra.eventlog.tracker import Tracker


class Partition:
    """waiting: fetched, not given yet. turn: when it last gave something, so that none comes short."""

    def __init__(self, topic: str, number: int, tracker: Tracker, window: int) -> None:
        self.topic = topic
        self.number = number
        self.tracker = tracker
        self.window = window
        self.waiting: deque[Record] = deque()
        self.paused = False
        self.turn = 0

    @property
    def free(self) -> bool:
        """It may give another record, if there is one."""
        tracker = self.tracker
        return not self.paused and tracker.open < self.window and tracker.accepts(tracker.end)

    @property
    def ready(self) -> bool:
        """Its next record, `waiting[0]`, may be given."""
        return (
            bool(self.waiting)
            and self.free
            and self.tracker.accepts(self.waiting[0].position.offset)
        )

    @property
    def hungry(self) -> bool:
        """It wants more to be fetched. Little at a time: what waits is memory."""
        return not self.waiting and self.free

    def give(self) -> Record | None:
        """The next record, which must be ready. None if it was completed by an earlier owner."""
        record = self.waiting.popleft()
        return None if self.tracker.received(record.position.offset) else record

    def open_positions(self) -> list[Position]:
        return [Position(self.topic, self.number, offset) for offset in self.tracker.open_offsets()]

    def replace(self, tracker: Tracker) -> list[Position]:
        """Go on from elsewhere. Returns what was open."""
        open_before = self.open_positions()
        self.tracker = tracker
        self.waiting.clear()
        return open_before
