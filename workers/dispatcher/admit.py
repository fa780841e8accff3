"""What to do with a job that arrived: run it, or the reason why not. Pure but for the model lookup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from schemas.admission import check_deadline, check_limits
from schemas.errors import InvalidJob, PipelineError, Transient
from schemas.jobs import Job
from schemas.models import ModelCard
from schemas.proof import TenantKeys, check_proof
from workers.dispatcher.memory import JobMemory, fingerprint_of

Resolve = Callable[[str, int | None], ModelCard]
"""Finds the version of a model to run. Raises InvalidJob (model_unknown, version_unknown)."""

Verdict = Literal["run", "refused", "expired", "cancelled", "duplicate", "conflict"]
"""duplicate: this very job is in hand or has ended. conflict: its key stands for other work, which keeps the id."""


class Admission(NamedTuple):
    """job: with its version pinned if it is to run. card: of that version. error: why not, if refused."""

    verdict: Verdict
    job: Job
    card: ModelCard | None = None
    error: PipelineError | None = None


class Admitter:
    """keys: of the tenants that must sign their jobs; None: whoever may write to a jobs topic is believed."""

    def __init__(
        self,
        resolve: Resolve,
        memory: JobMemory,
        max_deadline_s: float,
        keys: TenantKeys | None = None,
    ) -> None:
        self._resolve = resolve
        self._memory = memory
        self._max_deadline_s = max_deadline_s
        self._keys = keys

    def admit(self, job: Job, now: float, *, returned: bool = False) -> Admission:
        """now: seconds since the epoch. returned: from the retry topic, where a job is once only.

        Raises Transient when the model cannot be looked up now, and InvalidJob (tenant_unproven) for a
        job that must not have an outcome, because it may bear the name of another's.
        """
        if self._keys is not None and not returned:
            check_proof(job, self._keys)
        known_as = None if returned else self._memory.known_as(job, now)
        if known_as is not None:
            return _again(job, known_as)
        if self._memory.is_cancelled(job.id):
            return Admission("cancelled", job)
        if now >= job.deadline_at:
            return Admission("expired", job)
        return self._fresh(job, now)

    def _fresh(self, job: Job, now: float) -> Admission:
        try:
            check_deadline(job.deadline_at, self._max_deadline_s, now)
            card = self._resolve(job.model, job.version)
            check_limits(job, card)
        except Transient:
            raise
        except PipelineError as error:
            return Admission("refused", job, error=error)
        return Admission("run", msgspec.structs.replace(job, version=card.version), card)


def _again(job: Job, known_as: str) -> Admission:
    if known_as == fingerprint_of(job):
        return Admission("duplicate", job)
    return Admission(
        "conflict",
        job,
        error=InvalidJob(
            "idempotency_conflict",
            f"Idempotency key {job.key!r} already stands for another payload, model or params; "
            "use a new key for new work.",
        ),
    )
