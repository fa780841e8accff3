"""The dispatcher's story: receive, admit, batch, lease, complete. One thread, one step at a time.

It wakes when the log has something new, when a worker reports a batch, or when a worker has a free slot
that waiting jobs can use. Whatever a step decided is committed at its end, in one transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from infra.fleet import Fleet, Seat, SlotToken, new_batch_id
from infra.logs import get_logger
from infra.tasks import Mailboxes
from schemas.batches import Batch, BatchItem
from schemas.errors import Transient
from schemas.jobs import Job
from schemas.topics import LANES, LIVE_LANES
from workers.dispatcher.batching import Batcher
from workers.dispatcher.intake import Intake
from workers.dispatcher.leases import Leases
from workers.dispatcher.memory import OpenJob
from workers.dispatcher.outcomes import Outcomes
from workers.dispatcher.settle import Settlement
from workers.dispatcher.view_writer import ViewWriter

IDLE_S = 0.25
UNRIPE_S = 0.005
TIDY_EVERY_S = 0.25
SHOW_RUNNING_AFTER_S = 0.2

logger = get_logger("dispatcher")


class Dispatcher:
    def __init__(
        self,
        *,
        slot: int,
        lease_s: float,
        fleet: Fleet,
        mailboxes: Mailboxes,
        view_writer: ViewWriter,
        intake: Intake,
        batcher: Batcher,
        leases: Leases,
        settlement: Settlement,
        outcomes: Outcomes,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slot = slot
        self.lease_s = lease_s
        self.fleet = fleet
        self.mailboxes = mailboxes
        self.view_writer = view_writer
        self.intake = intake
        self.batcher = batcher
        self.leases = leases
        self.settlement = settlement
        self.outcomes = outcomes
        self.wall = wall
        self.monotonic = monotonic
        self._tidy_at = 0.0

    def step(self, *, draining: bool = False) -> None:
        """Wait for something to do, do it, commit it. Draining: finish what is out, take nothing new.

        Raises Transient when the log or Redis does not answer: call again a little later, nothing is lost.
        """
        self.outcomes.commit(self.wall())
        token = self._listen(draining)
        now = self.wall()
        try:
            if not draining:
                self.intake.receive(now)
                token = self._dispatch(token, now)
            self._tidy(now)
        finally:
            self.outcomes.commit(self.wall())
            if token is not None:
                self.fleet.return_slot(token)

    def _listen(self, draining: bool) -> SlotToken | None:
        """Sleep until something happens; settle what workers report; return a slot that came free."""
        now = self.wall()
        seats = [] if draining else self._seats(now)
        signals = self.fleet.wait(self.slot, seats, self._patience_s(now, bool(seats)))
        self.settlement.settle(signals.completions, self.wall())
        return signals.token

    def _patience_s(self, now: float, ready: bool) -> float:
        if len(self.batcher) and not ready:
            return UNRIPE_S
        if (wake_at := self.intake.next_wake()) is not None:
            return min(IDLE_S, max(0.001, wake_at - now))
        return IDLE_S

    def _seats(self, now: float) -> list[Seat]:
        """Which slots the waiting jobs can use; those for live lanes stay free of bulk."""
        lanes = self.batcher.ready_lanes(now)
        if lanes & set(LIVE_LANES):
            return ["any", "live"]
        return ["any"] if lanes else []

    def _dispatch(self, token: SlotToken | None, now: float) -> SlotToken | None:
        """Give batches to slots while there are both; returns a slot that found no use."""
        while seats := self._seats(now):
            token = token or self.fleet.take_slot(seats)
            if token is None:
                return None
            jobs = self.batcher.next_batch(LANES if token.seat == "any" else LIVE_LANES, now)
            if not jobs:
                break
            self._send(token, jobs)
            token = None
        return token

    def _send(self, token: SlotToken, jobs: list[OpenJob]) -> None:
        """Lease a batch to the worker behind the slot. If Redis fails the jobs go back to wait."""
        batch = self._batch(jobs)
        try:
            self.fleet.lease(batch)
            self.mailboxes.send(token.worker, batch.id, token.packed())
        except Transient:
            self.batcher.add(jobs)
            raise
        for job in jobs:
            job.dispatches += 1
        self.leases.grant(batch.id, token.worker, jobs, self.monotonic())
        logger.debug("batch_sent", batch=batch.id, worker=token.worker, jobs=len(jobs))

    def _batch(self, jobs: list[OpenJob]) -> Batch:
        card = jobs[0].card
        return Batch(
            id=new_batch_id(),
            model=card.name,
            version=card.version,
            reply_to=self.slot,
            lease_s=self.lease_s,
            max_run_s=card.limits.max_run_s,
            alone=jobs[0].job.suspect,
            items=[_item(job.job) for job in jobs],
        )

    def _tidy(self, now: float) -> None:
        """What only time brings about: delayed jobs, deadlines, lost leases, a view to be rebuilt."""
        self.intake.wake(now)
        if self.monotonic() < self._tidy_at:
            return
        self._tidy_at = self.monotonic() + TIDY_EVERY_S
        if self.view_writer.behind:
            self.leases.all_due()
            self.view_writer.catch_up(now)
        self._check_leases(now)
        self._show_running()

    def _show_running(self) -> None:
        """Only what runs for a while is shown as running: most jobs end before anybody could look."""
        for lease in self.leases.unshown(self.monotonic() - SHOW_RUNNING_AFTER_S):
            self.view_writer.running([job.job for job in lease.jobs])
            lease.shown = True

    def _check_leases(self, now: float) -> None:
        due = self.leases.due(self.monotonic())
        phases = self.fleet.phases([lease.batch_id for lease in due])
        if not all(phase.leased for phase in phases):
            # A worker ends its lease as it reports: what was reported meanwhile is no loss.
            self.settlement.settle(self.fleet.completions(self.slot), now)
        for lease, phase in zip(due, phases, strict=True):
            if phase.leased:
                self.leases.renewed(lease.batch_id, self.monotonic())
            elif self.leases.holds(lease.batch_id):
                self.settlement.lost(lease, begun=phase.begun, now=now)


def _item(job: Job) -> BatchItem:
    return BatchItem(
        job.id,
        job.tenant,
        job.payload,
        job.params,
        job.submitted_at,
        job.deadline_at,
        job.trace_id,
    )
