"""The way out: what workers report, or fail to report, becomes each job's outcome."""

from __future__ import annotations

from collections.abc import Iterable

from infra.logs import get_logger
from schemas.batches import DEADLINE_PASSED, Completion, ItemOutcome
from schemas.errors import DEVICE_FAILED, InferenceFailed, PipelineError
from workers.dispatcher.batching import Batcher
from workers.dispatcher.breaker import Breaker, CircuitKey, circuit_of
from workers.dispatcher.leases import Lease, Leases
from workers.dispatcher.memory import JobMemory, OpenJob
from workers.dispatcher.outcomes import Outcomes
from workers.dispatcher.waiting import Waiting

MAX_DISPATCHES = 20
"""A job that vanishes with its batch this often, without ever being run, counts as failed."""

BLAMELESS = frozenset(
    {
        "disk_full",
        "engine_build_busy",
        "engine_cache_unavailable",
        "engine_memory_full",
        "engine_not_built",
        "storage_full",
        "storage_unavailable",
    }
)
"""No fault of the job, and nothing that attempts would mend: it waits until its deadline, and is not charged."""

logger = get_logger("dispatcher")


class Settlement:
    def __init__(
        self,
        leases: Leases,
        memory: JobMemory,
        batcher: Batcher,
        outcomes: Outcomes,
        breaker: Breaker,
        waiting: Waiting,
    ) -> None:
        self._leases = leases
        self._memory = memory
        self._batcher = batcher
        self._outcomes = outcomes
        self._breaker = breaker
        self._waiting = waiting
        self._tripped: set[CircuitKey] = set()
        self.redispatched = 0

    def settle(self, completions: Iterable[Completion], now: float) -> None:
        """Judge the items of each batch that is on record; the report of any other is stale."""
        for completion in completions:
            jobs = self._leases.settle(completion.batch_id)
            if jobs is None:
                logger.info("completion_ignored", batch=completion.batch_id)
                continue
            ours = [job for job in jobs if job is not None]
            if not completion.items:
                self._given_back(ours, now)
            elif len(completion.items) != len(jobs):
                logger.error("completion_malformed", batch=completion.batch_id)
                self._died(ours, begun=True, now=now)
            else:
                for job, item in zip(jobs, completion.items, strict=True):
                    if job is not None:
                        self._judge(job, item, completion.worker, now)
            if len(ours) == len(jobs):
                self._outcomes.judged(completion.batch_id)

    def tripped(self) -> set[CircuitKey]:
        """Circuits that opened since the last call: jobs of theirs that wait are to be held back."""
        tripped, self._tripped = self._tripped, set()
        return tripped

    def lost(self, lease: Lease, *, begun: bool, now: float) -> None:
        """A batch's worker is gone. Jobs that were being run are suspect; all others just go again."""
        self._leases.end(lease.batch_id)
        self._outcomes.judged(lease.batch_id)
        logger.warning(
            "lease_lost",
            batch=lease.batch_id,
            worker=lease.worker,
            jobs=len(lease.held),
            begun=begun,
        )
        self._died(lease.held, begun=begun, now=now)

    def _died(self, jobs: list[OpenJob], *, begun: bool, now: float) -> None:
        self.redispatched += len(jobs)
        for job in jobs:
            if not begun and job.dispatches < MAX_DISPATCHES:
                self._run_again(job, now)
                continue
            error = InferenceFailed("worker_died", _death_of(job, begun))
            self._failed(job, error, now, passing=begun, suspect=True)

    def _given_back(self, jobs: list[OpenJob], now: float) -> None:
        """Their worker drains: the jobs go elsewhere, and nobody is charged."""
        for job in jobs:
            job.dispatches -= 1
            self._run_again(job, now)

    def _judge(self, job: OpenJob, item: ItemOutcome, worker: str, now: float) -> None:
        if item.code is None or item.invalid:
            self._waiting.answered(job.model)
        if self._memory.is_cancelled(job.job.id):
            self._outcomes.end(job.job, job.at, "cancelled", now)
        elif now >= job.job.deadline_at or item.code == DEADLINE_PASSED:
            self._outcomes.end(job.job, job.at, "expired", now)
        elif item.code is None:
            self._breaker.record(circuit_of(job), True, now)
            self._outcomes.answer(job.job, job.at, item, worker, now)
        else:
            error = PipelineError(item.code, item.message or item.code)
            # As with a worker that died, it may be one job's doing: each of the batch goes alone from then on.
            suspect = item.code == DEVICE_FAILED
            self._failed(job, error, now, passing=item.retry, suspect=suspect, invalid=item.invalid)

    def _record_failure(self, key: CircuitKey, now: float) -> None:
        if self._breaker.record(key, False, now):
            logger.warning(
                "breaker_opened", model=key.model, version=key.version, tenant=key.tenant
            )
            self._tripped.add(key)

    def _run_again(self, job: OpenJob, now: float) -> None:
        """As if it had never been sent; nobody is charged."""
        if self._memory.is_cancelled(job.job.id):
            self._outcomes.end(job.job, job.at, "cancelled", now)
        else:
            self._batcher.add([job])

    def _failed(
        self,
        job: OpenJob,
        error: PipelineError,
        now: float,
        *,
        passing: bool,
        suspect: bool,
        invalid: bool = False,
    ) -> None:
        """passing: another attempt may mend it. invalid: the model is not to blame."""
        if self._memory.is_cancelled(job.job.id):
            self._outcomes.end(job.job, job.at, "cancelled", now)
        elif error.code in BLAMELESS:
            until = self._waiting.missed(job.model, job.job.submitted_at, now)
            self._outcomes.defer(job.job, job.at, until, now, waits_for=error.code)
        elif passing and job.job.attempt + 1 < job.card.limits.max_attempts:
            self._outcomes.retry(job.job, job.at, now, suspect=suspect)
        else:
            if not invalid:
                self._record_failure(circuit_of(job), now)
            self._outcomes.fail(job.job, job.at, error, now)


def _death_of(job: OpenJob, begun: bool) -> str:
    if not begun:
        return f"Its batch vanished {job.dispatches} times before a worker began with it."
    return (
        f"The worker died or overran {job.card.limits.max_run_s:.0f} s with this job in hand, "
        f"{job.job.attempt + 1} times."
    )
