"""Batches out with workers. Pure, on a monotonic clock that is handed in.

This memory is the authority: a report counts only for a batch that is on record here, and only for the jobs
in it that this dispatcher holds. The other places are vacant: their jobs are, or may become, another
dispatcher's, or their records are yet to come from the log.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from infra.eventlog import Position
from schemas.batches import Assignment
from schemas.jobs import Job
from workers.dispatcher.memory import OpenJob

ADOPTED_POLL_S = 0.25
"""How often to look after a batch whose report goes to another dispatcher's inbox."""

VACANT_S = 120.0
"""How long a batch with no job of ours is kept on record, in case one comes."""

Attempt = tuple[str, int]
"""Job id, and failed attempts so far: an attempt's batch is nothing to later attempts."""


@dataclass(slots=True)
class Lease:
    """attempts, jobs: in the order of the batch's items; None where we do not hold the job.
    check_at: monotonic time when its sign of life is next looked for. shown: whether its jobs are
    shown as running."""

    batch_id: str
    worker: str
    version: int
    attempts: list[Attempt]
    jobs: list[OpenJob | None]
    sent_at: float
    check_at: float
    poll_s: float
    shown: bool = False

    @property
    def held(self) -> list[OpenJob]:
        """The jobs of it that are ours."""
        return [job for job in self.jobs if job is not None]


class Leases:
    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[str, Lease] = {}
        self._vacant: dict[Attempt, Lease] = {}

    def __len__(self) -> int:
        """Batches that hold a job of ours."""
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Lease]:
        return (lease for lease in self._leases.values() if any(lease.jobs))

    def grant(self, batch_id: str, worker: str, jobs: list[OpenJob], now: float) -> None:
        """Put a batch of ours on record; all its jobs are of one version."""
        version = jobs[0].card.version
        attempts = [_attempt(job.job) for job in jobs]
        check_at, poll_s = now + self._lease_s, self._lease_s / 4
        self._leases[batch_id] = Lease(
            batch_id, worker, version, attempts, list(jobs), now, check_at, poll_s
        )

    def adopt(self, found: Assignment, now: float) -> None:
        """Put a batch on record that another dispatcher, or an earlier life of this one, has sent."""
        if found.batch_id in self._leases:
            return
        attempts = list(zip(found.job_ids, found.attempts, strict=True))
        vacant: list[OpenJob | None] = [None] * len(attempts)
        lease = Lease(
            found.batch_id, found.worker, found.version, attempts, vacant, now, now, ADOPTED_POLL_S
        )
        self._leases[lease.batch_id] = lease
        self._vacant.update(dict.fromkeys(attempts, lease))

    def vacancy(self, job: Job) -> Lease | None:
        """The batch in which this attempt at the job is out already."""
        return self._vacant.get(_attempt(job))

    def occupy(self, job: OpenJob) -> None:
        """The job is ours now, and has a place in a batch that is out. Looked after at the next chance."""
        attempt = _attempt(job.job)
        lease = self._vacant.pop(attempt)
        lease.jobs[lease.attempts.index(attempt)] = job
        lease.check_at = 0.0

    def vacate(self, lost: Collection[Position]) -> None:
        """Jobs at these positions are another dispatcher's now."""
        for lease in self._leases.values():
            for place, job in enumerate(lease.jobs):
                if job is not None and job.at in lost:
                    lease.jobs[place] = None
                    lease.poll_s = ADOPTED_POLL_S
                    self._vacant[lease.attempts[place]] = lease

    def settle(self, batch_id: str) -> list[OpenJob | None] | None:
        """The jobs of a batch whose report came, in the order of its items, None where they are not ours.
        None if it is not (or no longer) on record. It stays there while places of it are vacant."""
        lease = self._leases.get(batch_id)
        if lease is None:
            return None
        jobs, lease.jobs = lease.jobs, [None] * len(lease.jobs)
        if not any(self._vacant.get(attempt) is lease for attempt in lease.attempts):
            del self._leases[batch_id]
        return jobs

    def end(self, batch_id: str) -> None:
        """Strike a batch off the record, with its vacant places."""
        lease = self._leases.pop(batch_id)
        for attempt in lease.attempts:
            if self._vacant.get(attempt) is lease:
                del self._vacant[attempt]

    def drop_vacant(self, now: float) -> None:
        """Strike off batches in which no place became ours for long enough."""
        for lease in list(self._leases.values()):
            if not any(lease.jobs) and now - lease.sent_at > VACANT_S:
                self.end(lease.batch_id)

    def due(self, now: float) -> list[Lease]:
        """Leases of ours that may have run out on the server by now."""
        return [lease for lease in self if now >= lease.check_at]

    def unshown(self, sent_before: float) -> list[Lease]:
        """Leases granted before a monotonic time whose jobs are not shown as running yet."""
        return [lease for lease in self if not lease.shown and lease.sent_at <= sent_before]

    def not_before(self, when: float) -> None:
        """Look at no lease before a monotonic time."""
        for lease in self._leases.values():
            lease.check_at = max(lease.check_at, when)

    def all_due(self) -> None:
        """Look at every lease at the next chance (the server lost its memory)."""
        for lease in self._leases.values():
            lease.check_at = 0.0

    def renewed(self, batch_id: str, now: float) -> None:
        """Its worker still renews it. Look again soon: the server's clock counts, not this one."""
        if lease := self._leases.get(batch_id):
            lease.check_at = now + lease.poll_s


def _attempt(job: Job) -> Attempt:
    return job.id, job.attempt
