"""What to do with a job that arrived: run it, or the reason why not. Pure but for the model lookup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from schemas.errors import InvalidJob, PipelineError
from schemas.jobs import Job
from schemas.models import ModelCard
from workers.dispatcher.memory import NO_KEY, JobMemory

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
    def __init__(self, resolve: Resolve, memory: JobMemory, max_deadline_s: float) -> None:
        self._resolve = resolve
        self._memory = memory
        self._max_deadline_s = max_deadline_s

    def admit(self, job: Job, now: float) -> Admission:
        """now: seconds since the epoch."""
        known_as = self._memory.known_as(job.id, now)
        if known_as is not None:
            return _again(job, known_as)
        if self._memory.is_cancelled(job.id):
            return Admission("cancelled", job)
        if now >= job.deadline_at:
            return Admission("expired", job)
        return self._fresh(job)

    def _fresh(self, job: Job) -> Admission:
        try:
            check_deadline(job, self._max_deadline_s)
            card = self._resolve(job.model, job.version)
            check_limits(job, card)
        except InvalidJob as error:
            return Admission("refused", job, error=error)
        return Admission("run", msgspec.structs.replace(job, version=card.version), card)


def _again(job: Job, known_as: str) -> Admission:
    if known_as == (job.fingerprint if job.key is not None else NO_KEY):
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


def check_deadline(job: Job, max_deadline_s: float) -> None:
    """Raises InvalidJob (deadline_too_far)."""
    if (ahead_s := job.deadline_at - job.submitted_at) > max_deadline_s:
        raise InvalidJob(
            "deadline_too_far",
            f"Expected a deadline at most {max_deadline_s:.0f} s after submission, came {ahead_s:.0f} s.",
        )


def check_limits(job: Job, card: ModelCard) -> None:
    """Raises InvalidJob (payload_empty, payload_too_large, wrong_modality)."""
    size = job.payload.size_bytes
    if size == 0:
        raise InvalidJob("payload_empty", f"Expected {card.modality} bytes, came none.")
    if size > card.limits.max_bytes:
        raise InvalidJob(
            "payload_too_large",
            f"Model {card.name} takes at most {card.limits.max_bytes} bytes, came {size}.",
        )
    if job.topic.split(".")[1] != card.modality:
        raise InvalidJob(
            "wrong_modality",
            f"Model {card.name} takes {card.modality} jobs, this one came on {job.topic}.",
        )
