"""The dispatcher's story: receive, admit, batch, lease, complete. One thread, one step at a time.

It wakes when the log has something new, when a worker reports a batch, or when a worker has a free slot
that waiting jobs can use. Whatever a step decided is committed at its end, in one transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from infra.eventlog import Moved
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
from workers.dispatcher.residents import Residents
from workers.dispatcher.settle import Settlement
from workers.dispatcher.view_writer import ViewWriter

IDLE_S = 0.05
"""How long a record of a producer that rings no bell may lie unseen."""

UNRIPE_S = 0.005
LOOK_S = 0.005
"""How long to wait on the log at a time for what was announced."""

RUNG_S = 0.1
"""How long to wait for it altogether: on some logs a record is there a little after the ring."""

TIDY_EVERY_S = 0.25
GRACE_S = 3.0
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
        residents: Residents,
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
        self.residents = residents
        self.wall = wall
        self.monotonic = monotonic
        self._slot: SlotToken | None = None
        self._tidy_at = 0.0
        self._losses = 0
        self._expected_until = 0.0

    def step(self, *, draining: bool = False) -> None:
        """Wait for something to do, do it, commit it. Draining: finish what is out, take nothing new.

        Raises Transient when the log or Redis does not answer: call again a little later, nothing is lost.
        """
        self._commit()
        try:
            self._listen(draining)
            if not len(self.batcher):
                self._commit()  # no slot stands idle for it, and somebody waits for these results
            if not draining:
                self._take_in()
            self._tidy(self.wall())
        except Transient:
            # Workers could not renew their leases either: give them time to, once Redis is back.
            self.leases.not_before(self.monotonic() + GRACE_S)
            raise
        finally:
            self._return_slot()
            self._commit()

    def _commit(self) -> None:
        """Write what was decided, but what is another dispatcher's to decide by now."""
        try:
            self.outcomes.commit(self.wall())
        except Moved:
            self.intake.drop_lost()
            self.outcomes.commit(self.wall())

    def _listen(self, draining: bool) -> None:
        """Sleep until something happens; settle what workers report; keep a slot that came free."""
        now = self.wall()
        seats = [] if draining or self._slot else self._seats(now)
        patience_s = IDLE_S if draining else self._patience_s(now, bool(seats))
        signals = self.fleet.wait(self.slot, seats, patience_s)
        self._slot = signals.token or self._slot
        if signals.rung:
            self._expected_until = self.monotonic() + RUNG_S
        self.settlement.settle(signals.completions, self.wall())
        self.intake.hold_back(self.settlement.tripped(), self.wall())

    def _take_in(self) -> None:
        try:
            if self.intake.receive(self.wall(), LOOK_S if self._expecting else 0):
                self._expected_until = 0.0
        finally:
            # Whatever kept records from coming in, jobs in hand go on.
            self._dispatch(self.wall())

    @property
    def _expecting(self) -> bool:
        """The bell rang, and what it announced has not come, although there is room for it."""
        return self.monotonic() < self._expected_until and not self.intake.full

    def _patience_s(self, now: float, ready: bool) -> float:
        if self._expecting:
            return 0
        if len(self.batcher) and not ready:
            return UNRIPE_S
        if (wake_at := self.intake.next_wake()) is not None:
            return min(IDLE_S, max(0.001, wake_at - now))
        return IDLE_S

    def _seats(self, now: float) -> list[Seat]:
        """Which slots the waiting jobs can use; those for live lanes stay free of bulk."""
        lanes = self.batcher.ready_lanes(now)
        if lanes & set(LIVE_LANES):
            return ["live", "any"]
        return ["any"] if lanes else []

    def _dispatch(self, now: float) -> None:
        """Give batches to slots while there are both."""
        while seats := self._seats(now):
            self._slot = self._slot or self.fleet.take_slot(seats)
            if self._slot is None:
                return
            lanes = LANES if self._slot.seat == "any" else LIVE_LANES
            loaded = self.residents.of(self._slot.worker)
            jobs = self.batcher.next_batch(lanes, now, loaded)
            if not jobs:
                return
            self._send(jobs)

    def _return_slot(self) -> None:
        """Hand back a slot that found no use."""
        if self._slot is not None:
            self.fleet.offer(self._slot)
            self._slot = None

    def _send(self, jobs: list[OpenJob]) -> None:
        """Lease a batch to the worker behind the slot. A send that fails may have gone through all the same,
        so its jobs wait for the lease to end before they go again."""
        batch = self._batch(jobs)
        try:
            token = self._slot = self._slot_for(jobs[0].model)
            self.fleet.lease(batch, token.worker)
        except Transient:
            self.batcher.add(jobs)
            raise
        for job in jobs:
            job.dispatches += 1
        self.leases.grant(batch.id, token.worker, jobs, self.monotonic())
        self._slot = None
        self.mailboxes.send(token.worker, batch.id, token.packed())
        logger.debug("batch_sent", batch=batch.id, worker=token.worker, jobs=len(jobs))

    def _slot_for(self, model: str) -> SlotToken:
        """The slot in hand, or a free one of a worker that has the model loaded, if the one in hand has not."""
        assert self._slot is not None
        holders = self.residents.holders(model)
        if not holders or self._slot.worker in holders:
            return self._slot
        return self.fleet.exchange(self._slot, holders)

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
        self.intake.release(now)
        self.intake.expire(now)
        self.view_writer.catch_up(now)
        if self.view_writer.losses != self._losses:
            # Redis lost its memory, and so every lease: no need to wait for each to run out.
            self._losses = self.view_writer.losses
            self.leases.all_due()
        self._check_leases(now)
        self._show_running()
        self.residents.look()
        self.leases.drop_vacant(self.monotonic())
        self.forget_answered()

    def forget_answered(self) -> None:
        """Clear up after batches whose every outcome is written. What cannot be cleared now ends by its TTL."""
        if batch_ids := self.outcomes.answered():
            self.fleet.forget(batch_ids)

    def _show_running(self) -> None:
        """Only what runs for a while is shown as running: most jobs end before anybody could look."""
        for lease in self.leases.unshown(self.monotonic() - SHOW_RUNNING_AFTER_S):
            self.view_writer.running([job.job for job in lease.held])
            lease.shown = True

    def _check_leases(self, now: float) -> None:
        due = self.leases.due(self.monotonic())
        phases = self.fleet.phases([lease.batch_id for lease in due])
        standing = list(zip(due, phases, strict=True))
        reported = [lease.batch_id for lease, phase in standing if phase.reported]
        self.settlement.settle(self.fleet.reports(reported), now)
        for lease, phase in standing:
            if not lease.held:
                continue  # settled
            if phase.leased:
                self.leases.renewed(lease.batch_id, self.monotonic())
            else:
                self.settlement.lost(lease, begun=phase.begun or phase.reported, now=now)


def _item(job: Job) -> BatchItem:
    return BatchItem(
        job.id,
        job.tenant,
        job.payload,
        job.params,
        job.submitted_at,
        job.deadline_at,
        job.trace_id,
        job.attempt,
    )
