"""What became of jobs, gathered until one transaction writes it all: results, retries, dead letters, positions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

import msgspec

from infra.eventlog import Consumer, NewRecord, Position, Record
from infra.job_view import Ended
from infra.logs import get_logger
from schemas.batches import ItemOutcome
from schemas.errors import InvalidJob, PipelineError
from schemas.jobs import (
    DEAD_LETTER_HEADERS,
    KEY_LIMIT_CHARS,
    VALUE_DROPPED,
    Job,
    job_headers,
    job_value,
    retry_headers,
)
from schemas.results import Outcome, Status, encode_outcome, outcome_of, result_headers
from schemas.topics import KEYS, RESULTS, RETRY, dead_letter_topic, is_dead_letter_topic
from workers.dispatcher.memory import JobMemory, fingerprint_of, is_keyed
from workers.dispatcher.view_writer import ViewWriter

logger = get_logger("dispatcher")


class RetryPolicy:
    """After a failure, full jitter: somewhere between now and base * 2 ** failures, capped."""

    def __init__(self, base_s: float, cap_s: float, rng: random.Random | None = None) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._rng = rng or random.Random()

    def delay_s(self, failures: int) -> float:
        return self._rng.uniform(0, min(self._cap_s, self._base_s * 2 ** min(failures, 32)))


class Written(NamedTuple):
    """What one record comes to: what is to be appended, and what is to be shown of a job that ended.
    job: left out where the record stands for none."""

    outputs: list[NewRecord]
    job: Job | None = None
    ended: Ended | None = None


class Outcomes:
    """Nothing here is visible to anybody until `commit`; a failed commit keeps everything for the next."""

    def __init__(
        self, consumer: Consumer, memory: JobMemory, view: ViewWriter, policy: RetryPolicy
    ) -> None:
        self._consumer = consumer
        self._memory = memory
        self._view = view
        self._policy = policy
        self._written: dict[Position, Written] = {}
        self._judged: list[str] = []
        self._answered: list[str] = []
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._written)

    def answer(self, job: Job, at: Position, item: ItemOutcome, worker: str, now: float) -> None:
        """The job has its result."""
        outcome = outcome_of(
            job,
            "succeeded",
            answer=msgspec.Raw(item.answer or b"null"),
            ref=item.ref,
            attempts=job.attempt + 1,
            finished_at=now,
            times=item.times,
            worker=worker,
        )
        self._end(job, at, outcome, now)

    def end(self, job: Job, at: Position, status: Status, now: float) -> None:
        """The job ended without a run that counts: expired or cancelled."""
        self._end(job, at, outcome_of(job, status, attempts=job.attempt, finished_at=now), now)

    def fail(self, job: Job, at: Position, error: PipelineError, now: float) -> None:
        """The job failed for good: a dead letter, and its outcome."""
        outcome = outcome_of(
            job,
            "failed",
            code=error.code,
            message=error.message,
            attempts=job.attempt + 1,
            finished_at=now,
        )
        letter = _dead_letter(_record_of(job, at), job.topic, error, job.attempt + 1)
        self._end(job, at, outcome, now, letter)

    def reject(self, record: Record, error: PipelineError) -> None:
        """The record cannot stand for a job: to the dead letters as it came, without an outcome."""
        topic = record.position.topic
        self.counts["rejected"] += 1
        self._written[record.position] = Written([_dead_letter(record, topic, error, attempt=1)])

    def retry(self, job: Job, at: Position, now: float, *, suspect: bool) -> None:
        """The job runs again, later: the retry topic keeps it, with what happened so far."""
        again = msgspec.structs.replace(
            job,
            attempt=job.attempt + 1,
            suspect=suspect,
            not_before=now + self._policy.delay_s(job.attempt),
            waits_for=None,
        )
        self.counts["retried"] += 1
        self._move(again, at, now)

    def defer(
        self, job: Job, at: Position, until: float, now: float, waits_for: str | None = None
    ) -> None:
        """The job cannot run before a time, and nobody is charged: the retry topic keeps it meanwhile."""
        self.counts["deferred"] += 1
        self._move(msgspec.structs.replace(job, not_before=until, waits_for=waits_for), at, now)

    def skip(self, at: Position) -> None:
        """The record needs no outcome of its own: a duplicate, a control message, a job moved to the retry topic."""
        self._written[at] = Written([])

    def judged(self, batch_id: str) -> None:
        """Every job of this batch has its outcome here, or is to run again."""
        self._judged.append(batch_id)

    def answered(self) -> list[str]:
        """Batches that were judged and have all their outcomes written, since the last call."""
        answered, self._answered = self._answered, []
        return answered

    def lost(self, positions: Collection[Position]) -> None:
        """Drop what was to be written of these, which are another dispatcher's now. Their new owner may have
        to learn it from the reports of their batches."""
        lost = self._written.keys() & positions
        if lost:
            self._judged.clear()
        for at in lost:
            if job := self._written.pop(at).job:
                self._memory.forget(job)

    def commit(self, now: float) -> None:
        """Write everything gathered as one transaction, then show it.

        Raises Transient or Fenced from the log; then what was not written stays for the next.
        """
        try:
            self._write(list(self._written), now)
        except InvalidJob:
            self._write_singly(now)
        self._answered += self._judged
        self._judged.clear()

    def _write(self, positions: list[Position], now: float) -> None:
        if not positions:
            return
        written = [self._written[at] for at in positions]
        self._consumer.complete(positions, [record for one in written for record in one.outputs])
        for at in positions:
            del self._written[at]
        self._view.show([one.ended for one in written if one.ended], now)

    def _write_singly(self, now: float) -> None:
        """The log does not take one of the records for its size: a retry or a dead letter, which have more
        headers than the job had. What they answer must end all the same, or its partition stands still."""
        for at in list(self._written):
            try:
                self._write([at], now)
            except InvalidJob as error:
                self._write_smaller(at, error, now)

    def _write_smaller(self, at: Position, error: InvalidJob, now: float) -> None:
        """A job that cannot be retried fails. A dead letter goes without its value, or with the reason alone:
        the original is where its headers say, for as long as its topic keeps it."""
        written = self._written[at]
        if written.job and any(record.topic == RETRY for record in written.outputs):
            made = max(written.job.attempt - 1, 0)
            self.fail(msgspec.structs.replace(written.job, attempt=made), at, error, now)
        logger.warning("dead_letter_cut", at=at, error=error.message)
        for smaller in (_without_value, _reason_alone):
            written = self._written[at]
            self._written[at] = written._replace(outputs=[*map(smaller, written.outputs)])
            with suppress(InvalidJob):
                return self._write([at], now)
        raise error

    def _move(self, job: Job, at: Position, now: float) -> None:
        again = NewRecord(RETRY, job.id, retry_headers(job), job_value(job))
        self._memory.moved(job, now)
        self._written[at] = Written([again, *_key(job)], job)

    def _end(
        self, job: Job, at: Position, outcome: Outcome, now: float, *letter: NewRecord
    ) -> None:
        value = encode_outcome(outcome)
        result = NewRecord(RESULTS, job.id, result_headers(outcome), value)
        self._memory.ended(job, now)
        self.counts[outcome.status] += 1
        shown = Ended(job.id, value, job.reply_to)
        self._written[at] = Written([result, *letter, *_key(job)], job, shown)


def _without_value(record: NewRecord) -> NewRecord:
    if not is_dead_letter_topic(record.topic):
        return record
    dropped = {VALUE_DROPPED: f"{len(record.value)} bytes"}
    return record._replace(headers=record.headers | dropped, value=b"")


def _reason_alone(record: NewRecord) -> NewRecord:
    if not is_dead_letter_topic(record.topic):
        return record
    reason = {name: record.headers[name] for name in DEAD_LETTER_HEADERS & record.headers.keys()}
    return record._replace(key=record.key[:KEY_LIMIT_CHARS], headers=reason)


def _key(job: Job) -> Iterator[NewRecord]:
    """What makes every dispatcher, and later lives of this one, know the job when it comes again."""
    if is_keyed(job):
        replay = {} if job.replay is None else {"replay": job.replay}
        yield NewRecord(KEYS, job.id, {"fingerprint": fingerprint_of(job)} | replay, b"")


def _record_of(job: Job, at: Position) -> Record:
    return Record(at, job.id, job_headers(job), job_value(job), job.submitted_at)


def _dead_letter(record: Record, topic: str, error: PipelineError, attempt: int) -> NewRecord:
    """The record as it was, for the dead letters of a topic, with headers that say where from and why."""
    at = record.position
    reason = {
        "x-original-topic": at.topic,
        "x-original-partition": str(at.partition),
        "x-original-offset": str(at.offset),
        "x-attempt": str(attempt),
        "x-error": error.code,
        "x-error-message": error.message,
    }
    return NewRecord(dead_letter_topic(topic), record.key, record.headers | reason, record.value)
