"""Admitted jobs gather here until a slot takes them. Pure, on a clock that is handed in.

With a free slot a single job leaves at once; without one, batches grow by themselves.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from schemas.topics import LANES, Lane
from workers.dispatcher.fairness import LaneClock
from workers.dispatcher.memory import OpenJob

Group = tuple[str, int, int] | None
"""Of jobs that may share a batch; None for the suspects, which never do."""

SLACK = 16

PASSED_OVER_S = 2.0
"""So long jobs may be passed over for others whose engine the worker has loaded already. It bounds how often
a worker with room for fewer engines than are asked for loads one: not more often than once in this time."""


class Queue:
    """Jobs of one group, the most urgent first. A job taken out leaves its entry in the heap until
    such entries outnumber the jobs; so both are cheap and the memory is bounded."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, OpenJob]] = []
        self._jobs: dict[str, OpenJob] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def push(self, job: OpenJob) -> None:
        self._jobs[job.job.id] = job
        heapq.heappush(self._heap, (-job.job.priority, job.order, job))

    def discard(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        if len(self._heap) > 2 * len(self._jobs) + SLACK:
            self._heap = [entry for entry in self._heap if self._holds(entry[2])]
            heapq.heapify(self._heap)

    @property
    def head(self) -> OpenJob:
        """The most urgent job; there must be one."""
        while not self._holds(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def pop(self) -> OpenJob:
        job = self.head
        heapq.heappop(self._heap)
        del self._jobs[job.job.id]
        return job

    def _holds(self, job: OpenJob) -> bool:
        return self._jobs.get(job.job.id) is job


class Batcher:
    """Waiting jobs by lane and group. batch_bytes: most payload bytes of one batch."""

    def __init__(self, clock: LaneClock, batch_bytes: int) -> None:
        self._clock = clock
        self._batch_bytes = batch_bytes
        self._lanes: dict[Lane, dict[Group, Queue]] = {lane: {} for lane in LANES}
        self._waiting: dict[str, OpenJob] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._waiting

    def __iter__(self) -> Iterator[OpenJob]:
        return iter(self._waiting.values())

    def add(self, jobs: Iterable[OpenJob]) -> None:
        for job in jobs:
            self._lanes[job.lane].setdefault(_group(job), Queue()).push(job)
            self._waiting[job.job.id] = job

    def remove(self, job_id: str) -> OpenJob | None:
        """Take a job out (cancelled, expired); None if it does not wait."""
        if job := self._waiting.pop(job_id, None):
            queue = self._lanes[job.lane][_group(job)]
            queue.discard(job_id)
            self._drop_if_empty(job.lane, _group(job))
        return job

    def ready_lanes(self, now: float) -> set[Lane]:
        """Lanes with a job that may leave now."""
        return {lane for lane in LANES if self._ready(lane, now)}

    def past_deadline(self, now: float) -> list[OpenJob]:
        """Take out the jobs whose deadline has come. Looks at every waiting job: call it now and then."""
        expired = [job for job in self._waiting.values() if job.job.deadline_at <= now]
        for job in expired:
            self.remove(job.job.id)
        return expired

    def next_batch(
        self, lanes: Iterable[Lane], now: float, loaded: Collection[str] | None = None
    ) -> list[OpenJob]:
        """The most deserving jobs that may run together; empty if none may leave now.

        lanes: those the slot at hand may serve. now: seconds since the epoch. loaded: `name/version` of what its
        worker has loaded, None if that is not known. A suspect leaves alone.
        """
        ready = {lane: groups for lane in lanes if (groups := self._ready(lane, now))}
        if (lane := self._clock.pick(ready)) is None:
            return []
        group, queue = min(
            ready[lane].items(),
            key=lambda item: (_passed_over(item[1].head, now, loaded), *_urgency(item[1].head)),
        )
        batch = self._fill(queue, alone=group is None)
        self._drop_if_empty(lane, group)
        self._clock.charge(lane, len(batch))
        return batch

    def summary(self) -> dict[Lane, list[OpenJob]]:
        by_lane: dict[Lane, list[OpenJob]] = defaultdict(list)
        for job in self._waiting.values():
            by_lane[job.lane].append(job)
        return by_lane

    def _ready(self, lane: Lane, now: float) -> dict[Group, Queue]:
        return {
            group: queue for group, queue in self._lanes[lane].items() if _may_leave(queue, now)
        }

    def _fill(self, queue: Queue, *, alone: bool) -> list[OpenJob]:
        batch: list[OpenJob] = []
        room = self._batch_bytes
        most = 1 if alone else queue.head.card.batch.max_jobs
        while queue and len(batch) < most:
            room -= queue.head.job.payload.size_bytes
            if batch and room < 0:
                break
            job = queue.pop()
            del self._waiting[job.job.id]
            batch.append(job)
        return batch

    def _drop_if_empty(self, lane: Lane, group: Group) -> None:
        if not self._lanes[lane][group]:
            del self._lanes[lane][group]


def _group(job: OpenJob) -> Group:
    return None if job.job.suspect else job.group


def _urgency(job: OpenJob) -> tuple[int, int]:
    return (-job.job.priority, job.order)


def _passed_over(job: OpenJob, now: float, loaded: Collection[str] | None) -> bool:
    """Whether jobs of engines that are loaded go first."""
    if loaded is None or job.model in loaded:
        return False
    return now - job.admitted_at < PASSED_OVER_S


def _may_leave(queue: Queue, now: float) -> bool:
    """Whether its batch is full, or its most urgent job has waited for company for as long as it may."""
    job = queue.head
    batch = job.card.batch
    if not batch.max_delay_ms or job.job.suspect or len(queue) >= batch.max_jobs:
        return True
    return now - job.admitted_at >= batch.max_delay_ms / 1000
