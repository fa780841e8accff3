"""The Celery task `run_batch.v1`: fetch a batch under its lease, run it, report it, offer the slot again."""

from __future__ import annotations

import time
from collections.abc import Callable

from celery import Celery

from infra.fleet import Fleet, SlotToken
from infra.logs import get_logger
from schemas.batches import RUN_BATCH, Batch, Completion, ItemOutcome
from schemas.errors import PipelineError, Transient
from workers.inference.gate import Gate
from workers.inference.hand import Hand, Held
from workers.inference.residency import Residency
from workers.inference.stages import Stages

REPORT_TRIES = 60
REPORT_PAUSE_S = 0.5

logger = get_logger("worker")


class BatchRunner:
    def __init__(
        self,
        fleet: Fleet,
        hand: Hand,
        residency: Residency,
        stages: Stages,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fleet = fleet
        self._hand = hand
        self._residency = residency
        self._stages = stages
        self._gate = Gate()
        self._sleep = sleep
        self.jobs_done = 0

    def register(self, app: Celery) -> None:
        app.task(name=RUN_BATCH, ignore_result=True)(self.run_batch)

    def run_batch(self, batch_id: str, slot: str) -> None:
        """Never raises for Redis: a batch that cannot be fetched or reported comes back by its lease."""
        token = SlotToken.unpack(slot)
        try:
            batch = self._fleet.fetch(batch_id)
            held = self._hand.hold(batch, token.seat) if batch else None
        except Transient as error:
            logger.warning("batch_not_fetched", batch=batch_id, error=error.message)
            held = None
        self._hand.used(token)
        try:
            if held:
                self._take(held)
        finally:
            self._hand.drop(batch_id)
            self.offer_slots()

    def offer_slots(self) -> None:
        """Offer what the hand has room for. What cannot be said now is said at a later beat."""
        for token in self._hand.new_offers():
            try:
                self._fleet.offer(token)
            except Transient:
                return

    def give_back(self, batch: Batch) -> None:
        """Return a batch unrun; its jobs go elsewhere and nobody is charged."""
        self._fleet.complete(batch, Completion(batch.id, self._hand.worker, []))

    def _take(self, held: Held) -> None:
        batch = held.batch
        if self._hand.closed:
            self.give_back(batch)
            return
        with self._gate.passage(alone=batch.alone):
            if not self._fleet.begin(batch):
                logger.warning("lease_lost", batch=batch.id, at="begin")
                return
            held.began_at = time.monotonic()
            items = self._run(batch)
            held.began_at = 0.0
        self.jobs_done += len(items)
        self._report(batch, Completion(batch.id, self._hand.worker, items))

    def _run(self, batch: Batch) -> list[ItemOutcome]:
        began = time.perf_counter()
        try:
            with self._residency.use(batch.model, batch.version) as model:
                items = self._stages.run(batch, model)
        except PipelineError as error:
            passing = isinstance(error, Transient)
            items = [
                ItemOutcome(code=error.code, message=error.message, retry=passing)
                for _ in batch.items
            ]
        failed = sum(item.code is not None for item in items)
        logger.info(
            "batch_run",
            batch=batch.id,
            model=f"{batch.model}/{batch.version}",
            jobs=len(items),
            failed=failed,
            ms=round((time.perf_counter() - began) * 1000, 1),
        )
        for item, outcome in zip(batch.items, items, strict=True):
            if outcome.code:
                logger.info(
                    "job_failed",
                    job=item.job_id,
                    trace=item.trace_id,
                    batch=batch.id,
                    code=outcome.code,
                )
        return items

    def _report(self, batch: Batch, completion: Completion) -> None:
        """The work is done, so a Redis that is away is waited for, as long as the lease could stand."""
        for _ in range(REPORT_TRIES):
            try:
                if self._fleet.holds(batch.id):
                    self._fleet.complete(batch, completion)
                else:
                    logger.warning("lease_lost", batch=batch.id, at="report")
                return
            except Transient:
                self._sleep(REPORT_PAUSE_S)
        logger.warning("batch_not_reported", batch=batch.id, action="its jobs run again")
