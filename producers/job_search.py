"""Finding jobs in the event log itself, for when the job view does not know them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

from infra.eventlog import EventLog, Record
from schemas.errors import InvalidJob
from schemas.jobs import Job, read_job, submitted_near
from schemas.results import Outcome, decode_outcome, outcome_of
from schemas.topics import JOB_TOPICS, RESULTS, RETRY, TOPIC_BY_NAME

CLOCK_MARGIN_S = 2.0


def find_ended(log: EventLog, job_ids: Collection[str]) -> Iterator[Outcome]:
    """The outcomes, so far, of these jobs. One pass over the results since the oldest of them.
    A job that was redriven has several, of which the last counts."""
    since = min(map(_since, job_ids))
    for record in log.read([RESULTS], since):
        if record.key in job_ids:
            yield decode_outcome(record.value)


def find_job(log: EventLog, job_id: str) -> Outcome | None:
    """The job's outcome, or its state as queued; None if the log does not hold it (any more).

    Reads on from the time in the id; an id without one (of an idempotency key) means reading everything.
    """
    found: Outcome | None = None
    for found in find_ended(log, {job_id}):
        # Only a failed job may be redriven, and so have another outcome.
        if found.status != "failed":
            break
    if found:
        return found
    for record in log.read(JOB_TOPICS, _since(job_id)):
        if record.key == job_id:
            return _queued(record)
    return None


def find_retry(log: EventLog, job_id: str) -> Job | None:
    """The job as it was last put off, with why and until when; None if it never was."""
    found = None
    for record in log.read([RETRY], _since(job_id)):
        if record.key == job_id:
            with suppress(InvalidJob):
                found = read_job(RETRY, record.headers, record.value, record.time)
    return found


def recent_jobs(
    log: EventLog, since: float, limit: int, wanted: Callable[[Outcome], bool]
) -> list[Outcome]:
    """The newest wanted jobs that were submitted since a time (seconds since the epoch), newest first.

    Reads results before jobs, so a job that ends meanwhile may still show as queued, never the reverse.
    """
    ended = {record.key: record.value for record in log.read([RESULTS], since)}
    newest: list[tuple[float, str, Outcome]] = []
    seen: set[str] = set()  # a job submitted again under its key has more than one record
    for record in log.read(JOB_TOPICS, since):
        if record.key in seen:
            continue
        seen.add(record.key)
        value = ended.get(record.key)
        outcome = decode_outcome(value) if value else _queued(record)
        if outcome and wanted(outcome):
            push = heapq.heappush if len(newest) < limit else heapq.heappushpop
            push(newest, (outcome.submitted_at, outcome.job_id, outcome))
    return [outcome for _, _, outcome in sorted(newest, key=lambda entry: entry[:2], reverse=True)]


def _since(job_id: str) -> float:
    """A time before which there is nothing about this job in the log."""
    made_at = submitted_near(job_id)
    if made_at is None:
        return time.time() - TOPIC_BY_NAME[RESULTS].retention_s
    return made_at - CLOCK_MARGIN_S


def _queued(record: Record) -> Outcome | None:
    try:
        job = read_job(record.position.topic, record.headers, record.value, record.time)
    except InvalidJob:
        return None
    return outcome_of(job, "queued")
