"""The Celery task `run_batch.v1`: fetch a batch under its lease, run it, report it, offer the slot again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from celery import Celery

from infra.fleet import Fleet, SlotToken
from infra.logs import get_logger
from schemas.batches import RUN_BATCH, Batch, Completion, ItemOutcome
from schemas.errors import DEVICE_FAILED, PipelineError, Transient
from workers.inference.gate import Gate
from workers.inference.hand import Hand, Held
from workers.inference.residency import Residency
from workers.inference.stages import Stages, failed

REPORT_TRIES = 60
REPORT_PAUSE_S = 0.5

logger = get_logger("worker")


class BatchRunner:
    """on_device_failed: called when that was reported of a batch, before the worker asks for more."""

    def __init__(
        self,
        fleet: Fleet,
        hand: Hand,
        residency: Residency,
        stages: Stages,
        on_device_failed: Callable[[], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fleet = fleet
        self._hand = hand
        self._residency = residency
        self._stages = stages
        self._gate = Gate()
        self._on_device_failed = on_device_failed
        self._sleep = sleep
        self.jobs_done = 0
        self.taken = 0

    def register(self, app: Celery) -> None:
        app.task(name=RUN_BATCH, ignore_result=True)(self.run_batch)

    def run_batch(self, batch_id: str, slot: str) -> None:
        """Never raises for Redis: a batch that cannot be fetched or reported comes back by its lease."""
        token = SlotToken.unpack(slot)
        self.taken += 1
        try:
            self._take(batch_id, token)
        except Transient as error:
            logger.warning("batch_left", batch=batch_id, error=error.message)
        finally:
            self._hand.used(token)
            self._hand.drop(batch_id)
            self.offer_slots()

    def offer_slots(self) -> None:
        """Offer what the hand has room for. What cannot be said now is said at a later beat."""
        for token in self._hand.new_offers():
            try:
                self._fleet.offer(token)
            except Transient:
                return

    def fail(self, model: str, error: PipelineError) -> None:
        """Report every batch for this model that has not begun; each of its jobs may be tried again. Such a batch
        is not in hand any more: its lease ends, so that it cannot begin."""
        item = ItemOutcome(code=error.code, message=error.message, retry=True)
        for held in self._hand.held():
            batch = held.batch
            if not held.began_at and f"{batch.model}/{batch.version}" == model:
                items = [item] * len(batch.items)
                self._report(batch, Completion(batch.id, self._hand.worker, items))
                self._hand.drop(batch.id)

    def give_back(self, batch: Batch) -> None:
        """Return a batch unrun; its jobs go elsewhere and nobody is charged."""
        self._fleet.complete(batch, Completion(batch.id, self._hand.worker, []))

    def _take(self, batch_id: str, token: SlotToken) -> None:
        batch = self._fleet.fetch(batch_id)
        if batch is None:
            logger.warning("lease_lost", batch=batch_id, at="fetch")
            return
        held = self._hand.hold(batch, token.seat)
        self._hand.used(token)
        with self._gate.passage(alone=batch.alone):
            if self._hand.closed:
                self.give_back(batch)
                return
            items = self._run(held)
            device_failed = any(item.code == DEVICE_FAILED for item in items or ())
            if device_failed:
                self._hand.close()  # before the next one passes
        if items is not None:
            self.jobs_done += sum(not item.retry for item in items)
            self._report(batch, Completion(batch.id, self._hand.worker, items))
        if device_failed:
            self._on_device_failed()

    def _run(self, held: Held) -> list[ItemOutcome] | None:
        """One outcome per item; None if the lease was lost before anything was run."""
        batch = held.batch
        began = time.perf_counter()
        try:
            with self._residency.use(batch.model, batch.version) as model:
                # Only now: a batch whose model is still being loaded is not suspect.
                if not self._begins(batch):
                    return None
                held.began_at = time.monotonic()
                items = self._stages.run(batch, model)
        except Exception as error:
            items = [failed(error)] * len(batch.items)
        finally:
            held.began_at = 0.0
        self._log(batch, items, (time.perf_counter() - began) * 1000)
        return items

    def _begins(self, batch: Batch) -> bool:
        """Mark the batch as begun; False if its lease is lost, or cannot be looked up."""
        try:
            begun = self._fleet.begin(batch)
        except Transient as error:
            logger.warning("batch_left", batch=batch.id, error=error.message)
            return False
        if not begun:
            logger.warning("lease_lost", batch=batch.id, at="begin")
        return begun

    def _log(self, batch: Batch, items: list[ItemOutcome], ms: float) -> None:
        logger.info(
            "batch_run",
            batch=batch.id,
            model=f"{batch.model}/{batch.version}",
            jobs=len(items),
            failed=Counter(item.code for item in items if item.code),
            ms=round(ms, 1),
        )
        for item, outcome in zip(batch.items, items, strict=True):
            if outcome.code:
                # Thousands may wait for an engine; of those that are retried their number is enough.
                (logger.debug if outcome.retry else logger.info)(
                    "job_failed",
                    job=item.job_id,
                    trace=item.trace_id,
                    batch=batch.id,
                    code=outcome.code,
                )

    def _report(self, batch: Batch, completion: Completion) -> None:
        """The work is done, so a Redis that is away is waited for, as long as the lease could stand."""
        for _ in range(REPORT_TRIES):
            try:
                if not self._fleet.complete(batch, completion):
                    logger.warning("lease_lost", batch=batch.id, at="report")
                return
            except Transient:
                self._sleep(REPORT_PAUSE_S)
        logger.warning("batch_not_reported", batch=batch.id, action="its jobs run again")
