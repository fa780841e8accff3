"""The way in: records of the log become open jobs, or are answered on the spot."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection
from contextlib import suppress

import msgspec

from infra.eventlog import Consumer, Follower, Record
from infra.logs import get_logger
from schemas.errors import InvalidJob, Transient
from schemas.jobs import read_cancel, read_job
from schemas.topics import CONTROL, JOB_TOPICS, RETRY, lane_of
from workers.dispatcher.admit import Admitter
from workers.dispatcher.batching import Batcher
from workers.dispatcher.breaker import Breaker, CircuitKey, circuit_of
from workers.dispatcher.leases import Leases
from workers.dispatcher.memory import JobMemory, OpenJob
from workers.dispatcher.outcomes import Outcomes
from workers.dispatcher.ownership import Ownership
from workers.dispatcher.waiting import Waiting

TOPICS = (*JOB_TOPICS, RETRY, CONTROL)
BULK_TOPICS = [topic for topic in JOB_TOPICS if lane_of(topic) == "bulk"]
RECEIVE_MOST = 1000

logger = get_logger("dispatcher")


class Intake:
    """control: every record of the control topic, whoever owns it: a job and the request to cancel it may
    have different owners. window_bytes: most bytes of inline payloads in memory at once."""

    def __init__(
        self,
        consumer: Consumer,
        control: Follower,
        ownership: Ownership,
        admitter: Admitter,
        memory: JobMemory,
        batcher: Batcher,
        leases: Leases,
        outcomes: Outcomes,
        breaker: Breaker,
        waiting: Waiting,
        window_bytes: int,
    ) -> None:
        self._consumer = consumer
        self._control = control
        self._ownership = ownership
        self._admitter = admitter
        self._memory = memory
        self._batcher = batcher
        self._leases = leases
        self._outcomes = outcomes
        self._breaker = breaker
        self._waiting = waiting
        self._window_bytes = window_bytes
        self._delayed: dict[str, OpenJob] = {}
        self._wake_at: list[tuple[float, int, OpenJob]] = []
        self._order = itertools.count()
        self._bulk_paused = False
        self._records: list[Record] = []

    def receive(self, now: float, wait_s: float = 0) -> int:
        """Take in what there is room for; returns how many records that were. wait_s: for the first one.

        Raises Transient when a model cannot be looked up now, or what earlier owners did: records wait here,
        and no more are asked for until they went through. All others were taken in.
        """
        self._hear_control(now)
        self._hold_back_bulk()
        if not self.full and not self._records:
            room = self._window_bytes - self._memory.held_bytes
            records: list[Record] = []
            try:
                records = self._consumer.receive(RECEIVE_MOST, room, wait_s)
            finally:
                self.drop_lost()
                self._records = records  # ours, also where what we had there before was lost
        self._ownership.take_over()
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
        return len(records)

    def drop_lost(self) -> None:
        """Let go of everything that is another dispatcher's now."""
        lost = self._ownership.drop_lost()
        if lost:
            self._records = [record for record in self._records if record.position not in lost]
            self._delayed = {id_: job for id_, job in self._delayed.items() if job.at not in lost}

    def wake(self, now: float) -> None:
        """Let go on what had to wait for its time."""
        while self._wake_at and self._wake_at[0][0] <= now:
            job = heapq.heappop(self._wake_at)[2]
            if self._delayed.get(job.job.id) is not job:
                continue  # cancelled or released meanwhile
            del self._delayed[job.job.id]
            if job.job.deadline_at <= now:
                self._outcomes.end(job.job, job.at, "expired", now)
            else:
                self._queue(job, now)

    def release(self, now: float) -> None:
        """Let go on jobs that waited for what their model lacked, and need not any longer."""
        left = self._waiting.release(now)
        for job in list(self._delayed.values()) if left else ():
            if job.job.waits_for and left.get(job.model):
                left[job.model] -= 1
                del self._delayed[job.job.id]
                self._queue(job, now)

    def hold_back(self, tripped: Collection[CircuitKey], now: float) -> None:
        """Take out what waits for models that only make dead letters."""
        for job in list(self._batcher) if tripped else ():
            if circuit_of(job) in tripped:
                self._batcher.remove(job.job.id)
                self._defer(job, now)

    def expire(self, now: float) -> None:
        """End what waited past its deadline."""
        for job in self._batcher.past_deadline(now):
            self._outcomes.end(job.job, job.at, "expired", now)

    @property
    def full(self) -> bool:
        """Whether there is no room for another record, whatever waits on the log."""
        return self._memory.held_bytes >= self._window_bytes

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
            # Every dispatcher hears it by itself; one of them answers for what is no event.
            read_cancel(record.key, record.headers, record.value)
            self._outcomes.skip(record.position)
            return
        job = read_job(record.position.topic, record.headers, record.value, record.time)
        if lease := self._leases.vacancy(job):
            job = msgspec.structs.replace(job, version=lease.version)
        returned = record.position.topic == RETRY
        admission = self._admitter.admit(job, now, returned=returned)
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
        if self._leases.vacancy(job.job):
            self._leases.occupy(job)
        elif job.job.not_before > now:
            wake_at = min(job.job.not_before, job.job.deadline_at)
            self._delayed[job.job.id] = job
            if job.job.waits_for:
                self._waiting.waits(job.model, now)
            heapq.heappush(self._wake_at, (wake_at, job.order, job))
        else:
            self._queue(job, now)

    def _queue(self, job: OpenJob, now: float) -> None:
        """Let it wait for a slot; or in the retry topic, while jobs like it are held back."""
        key = circuit_of(job)
        if self._breaker.allows(key, now):
            self._breaker.sent(key, now)
            self._batcher.add([job])
        else:
            self._defer(job, now)

    def _defer(self, job: OpenJob, now: float) -> None:
        until = self._breaker.retry_at(circuit_of(job)) or now
        self._outcomes.defer(job.job, job.at, until, now)

    def _hear_control(self, now: float) -> None:
        for record in self._control.receive():
            with suppress(InvalidJob):
                if job_id := read_cancel(record.key, record.headers, record.value):
                    self._cancel(job_id, now)

    def _cancel(self, job_id: str, now: float) -> None:
        self._memory.cancel(job_id)
        if job := self._batcher.remove(job_id) or self._delayed.pop(job_id, None):
            self._outcomes.end(job.job, job.at, "cancelled", now)
