"""Which records are ours: dispatchers share the partitions of the log, and hand them over while jobs run.

What was lost is dropped wherever it is held; it is the new owner's to answer. What was gained may have been
answered, or be out with a worker, under the owner before: that is looked up before its records are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from infra.eventlog import Consumer, EventLog, Position
from infra.fleet import Fleet
from infra.logs import get_logger
from schemas.topics import KEYS
from workers.dispatcher.batching import Batcher
from workers.dispatcher.leases import Leases
from workers.dispatcher.memory import JobMemory
from workers.dispatcher.outcomes import Outcomes
from workers.dispatcher.view_writer import ViewWriter

MARGIN_S = 60.0
"""By so much may the clocks of log and dispatcher differ."""

logger = get_logger("dispatcher")


class Ownership:
    """keys_window_s: how far back answered idempotency keys count."""

    def __init__(
        self,
        consumer: Consumer,
        log: EventLog,
        fleet: Fleet,
        memory: JobMemory,
        batcher: Batcher,
        leases: Leases,
        outcomes: Outcomes,
        view_writer: ViewWriter,
        keys_window_s: float,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consumer = consumer
        self._log = log
        self._fleet = fleet
        self._memory = memory
        self._batcher = batcher
        self._leases = leases
        self._outcomes = outcomes
        self._view_writer = view_writer
        self._recall_from = wall() - keys_window_s
        self._gained = False
        self._wall = wall
        self._monotonic = monotonic

    def drop_lost(self) -> Collection[Position]:
        """Forget what is another dispatcher's now. Returns which positions those are."""
        lost = set(self._consumer.lost())
        if lost:
            self._outcomes.lost(lost)
            self._leases.vacate(lost)
            for job in self._memory.lost(lost):
                self._batcher.remove(job.job.id)
            logger.info("positions_lost", count=len(lost))
        return lost

    def take_over(self) -> None:
        """Learn what earlier owners did with what is ours now.

        Raises Transient: nothing that was received may be used before this went through.
        """
        self._gained = self._consumer.gained() or self._gained
        if not self._gained:
            return
        self._recall_keys()
        for assignment in self._fleet.assignments():
            self._leases.adopt(assignment, self._monotonic())
        self._view_writer.look_back()
        self._gained = False

    def _recall_keys(self) -> None:
        began = self._wall()
        for record in self._log.read([KEYS], self._recall_from):
            fingerprint, replay = (
                record.headers.get("fingerprint", ""),
                record.headers.get("replay"),
            )
            self._memory.remember(record.key, fingerprint, replay, record.time)
        self._recall_from = began - MARGIN_S
