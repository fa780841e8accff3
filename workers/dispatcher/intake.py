"""The way in: records of the log become open jobs, or are answered on the spot."""

from __future__ import annotations

import heapq
import itertools

from infra.eventlog import Consumer, Record
from infra.logs import get_logger
from schemas.errors import InvalidJob, Transient
from schemas.jobs import CANCEL_TYPE, read_job
from schemas.topics import CONTROL, JOB_TOPICS, RETRY, lane_of
from workers.dispatcher.admit import Admitter
from workers.dispatcher.batching import Batcher
from workers.dispatcher.memory import JobMemory, OpenJob
from workers.dispatcher.outcomes import Outcomes

TOPICS = (*JOB_TOPICS, RETRY, CONTROL)
BULK_TOPICS = [topic for topic in JOB_TOPICS if lane_of(topic) == "bulk"]
RECEIVE_MOST = 1000

logger = get_logger("dispatcher")


class Intake:
    """window_bytes: most bytes of inline payloads in memory at once."""

    def __init__(
        self,
        consumer: Consumer,
        admitter: Admitter,
        memory: JobMemory,
        batcher: Batcher,
        outcomes: Outcomes,
        window_bytes: int,
    ) -> None:
        self._consumer = consumer
        self._admitter = admitter
        self._memory = memory
        self._batcher = batcher
        self._outcomes = outcomes
        self._window_bytes = window_bytes
        self._delayed: dict[str, OpenJob] = {}
        self._wake_at: list[tuple[float, int, OpenJob]] = []
        self._order = itertools.count()
        self._bulk_paused = False
        self._records: list[Record] = []

    def receive(self, now: float) -> None:
        """Take in what there is room for.

        Raises Transient when a model cannot be looked up now; its records wait here, and no more are
        asked for until they went through. All others were taken in.
        """
        self._hold_back_bulk()
        room = self._window_bytes - self._memory.held_bytes
        if room > 0 and not self._records:
            self._records = self._consumer.receive(RECEIVE_MOST, room)
        records, self._records = self._records, []
        trouble: Transient | None = None
        for record in records:
            try:
                self._take(record, now)
            except Transient as error:
                self._records.append(record)
                trouble = error
            except InvalidJob as error:
                logger.warning("record_rejected", topic=record.position.topic, error=error.message)
                self._outcomes.reject(record, error)
        if trouble:
            raise trouble

    def wake(self, now: float) -> None:
        """Let go on what had to wait for its time."""
        while self._wake_at and self._wake_at[0][0] <= now:
            job = heapq.heappop(self._wake_at)[2]
            if self._delayed.get(job.job.id) is not job:
                continue  # cancelled meanwhile
            del self._delayed[job.job.id]
            if job.job.deadline_at <= now:
                self._outcomes.end(job.job, job.at, "expired", now)
            else:
                self._batcher.add([job])

    def expire(self, now: float) -> None:
        """End what waited past its deadline."""
        for job in self._batcher.past_deadline(now):
            self._outcomes.end(job.job, job.at, "expired", now)

    @property
    def delayed(self) -> int:
        return len(self._delayed)

    def next_wake(self) -> float | None:
        """When the next delayed job may go on, seconds since the epoch."""
        return self._wake_at[0][0] if self._wake_at else None

    def _hold_back_bulk(self) -> None:
        """Bulk may fill half of the window; the rest is for lanes that somebody waits on."""
        mark = self._window_bytes / (4 if self._bulk_paused else 2)
        if (full := self._memory.held_bytes > mark) != self._bulk_paused:
            self._bulk_paused = full
            for topic in BULK_TOPICS:
                (self._consumer.pause if full else self._consumer.resume)(topic)

    def _take(self, record: Record, now: float) -> None:
        if record.position.topic == CONTROL:
            self._cancel(record, now)
            return
        job = read_job(record.position.topic, record.headers, record.value, record.time)
        if record.position.topic == RETRY:
            self._memory.returned(job.id)
        admission = self._admitter.admit(job, now)
        job, at = admission.job, record.position
        match admission.verdict:
            case "run":
                assert admission.card is not None
                lane = lane_of(job.topic) or "standard"
                self._hold(OpenJob(job, at, admission.card, lane, next(self._order), now), now)
            case "duplicate":
                self._outcomes.skip(at)
            case "conflict":
                assert admission.error is not None
                self._outcomes.reject(record, admission.error)
            case "refused":
                assert admission.error is not None
                self._outcomes.fail(job, at, admission.error, now)
            case "expired" | "cancelled" as status:
                self._outcomes.end(job, at, status, now)

    def _hold(self, job: OpenJob, now: float) -> None:
        self._memory.hold(job)
        if job.job.not_before > now:
            wake_at = min(job.job.not_before, job.job.deadline_at)
            self._delayed[job.job.id] = job
            heapq.heappush(self._wake_at, (wake_at, job.order, job))
        else:
            self._batcher.add([job])

    def _cancel(self, record: Record, now: float) -> None:
        self._outcomes.skip(record.position)
        if record.headers.get("ce_type") != CANCEL_TYPE:
            return
        self._memory.cancel(record.key)
        if job := self._batcher.remove(record.key) or self._delayed.pop(record.key, None):
            self._outcomes.end(job.job, job.at, "cancelled", now)
