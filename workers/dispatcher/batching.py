"""Admitted jobs gather here until a slot takes them. Pure, on a clock that is handed in.

There is no timer: with a free slot a single job leaves at once; without one, batches grow by themselves.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator

from schemas.topics import LANES, Lane
from workers.dispatcher.fairness import LaneClock
from workers.dispatcher.memory import OpenJob

Group = tuple[str, int, int]
_Entry = tuple[int, int, OpenJob]
"""(-priority, order, job): the heap's least is the most urgent."""


class Batcher:
    """Waiting jobs by lane and group, each group a heap by priority, then order of admission."""

    def __init__(self, clock: LaneClock, batch_bytes: int) -> None:
        self._clock = clock
        self._batch_bytes = batch_bytes
        self._lanes: dict[Lane, dict[Group, list[_Entry]]] = {lane: {} for lane in LANES}
        self._suspects: dict[Lane, list[_Entry]] = {lane: [] for lane in LANES}
        self._waiting: dict[str, OpenJob] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._waiting

    def __iter__(self) -> Iterator[OpenJob]:
        return iter(self._waiting.values())

    def add(self, jobs: Iterable[OpenJob]) -> None:
        for job in jobs:
            heap = (
                self._suspects[job.lane]
                if job.job.suspect
                else self._lanes[job.lane].setdefault(job.group, [])
            )
            heapq.heappush(heap, (-job.job.priority, job.order, job))
            self._waiting[job.job.id] = job

    def remove(self, job_id: str) -> OpenJob | None:
        """Take a job out (cancelled, expired). Its heap entry stays and is passed over later."""
        return self._waiting.pop(job_id, None)

    def ready_lanes(self, now: float) -> set[Lane]:
        """Lanes with a job that may leave now."""
        return {lane for lane in LANES if self._ripe(lane, now)}

    def past_deadline(self, now: float) -> list[OpenJob]:
        """Take out the jobs whose deadline has come. Looks at every waiting job: call it now and then."""
        expired = [job for job in self._waiting.values() if job.job.deadline_at <= now]
        for job in expired:
            del self._waiting[job.job.id]
        return expired

    def next_batch(self, lanes: Iterable[Lane], now: float) -> list[OpenJob]:
        """The most deserving jobs that may run together; empty if none may leave now.

        lanes: those the slot at hand may serve. now: seconds since the epoch. A suspect leaves alone.
        """
        heads = {lane: heads for lane in lanes if (heads := self._ripe(lane, now))}
        if (lane := self._clock.pick(heads)) is None:
            return []
        heap = min(heads[lane], key=lambda heap: heap[0][:2])
        batch = self._fill(heap, alone=heap is self._suspects[lane])
        self._clock.charge(lane, len(batch))
        return batch

    def summary(self) -> dict[Lane, list[OpenJob]]:
        by_lane: dict[Lane, list[OpenJob]] = defaultdict(list)
        for job in self._waiting.values():
            by_lane[job.lane].append(job)
        return by_lane

    def _heads(self, lane: Lane) -> list[list[_Entry]]:
        """The lane's heaps that hold a waiting job, each with such a job on top. Empty heaps are dropped."""
        groups = self._lanes[lane]
        for group, heap in list(groups.items()):
            if not self._settle(heap):
                del groups[group]
        suspects = self._suspects[lane]
        return [*groups.values(), *([suspects] if self._settle(suspects) else [])]

    def _settle(self, heap: list[_Entry]) -> bool:
        while heap and self._waiting.get(heap[0][2].job.id) is not heap[0][2]:
            heapq.heappop(heap)
        return bool(heap)

    def _ripe(self, lane: Lane, now: float) -> list[list[_Entry]]:
        return [heap for heap in self._heads(lane) if self._may_leave(heap, now)]

    def _may_leave(self, heap: list[_Entry], now: float) -> bool:
        head = heap[0][2]
        batch = head.card.batch
        if not batch.max_delay_ms or head.job.suspect or len(heap) >= batch.max_jobs:
            return True
        return now - head.job.submitted_at >= batch.max_delay_ms / 1000

    def _fill(self, heap: list[_Entry], *, alone: bool) -> list[OpenJob]:
        batch: list[OpenJob] = []
        room = self._batch_bytes
        most = 1 if alone else heap[0][2].card.batch.max_jobs
        while len(batch) < most and self._settle(heap):
            job = heap[0][2]
            room -= job.job.payload.size_bytes
            if batch and room < 0:
                break
            heapq.heappop(heap)
            del self._waiting[job.job.id]
            batch.append(job)
        return batch
