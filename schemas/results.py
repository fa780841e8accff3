"""The one outcome of a job, as it stands in the results topic and, byte for byte, in the job view."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from schemas.cloudevents import SPEC_VERSION
from schemas.fields import rfc3339
from schemas.jobs import Job
from schemas.payloads import Ref

RESULT_TYPE = "io.headrace.result.v1"

Status = Literal["queued", "running", "succeeded", "failed", "expired", "cancelled"]
"""queued: accepted. running: with a worker. succeeded, failed, expired, cancelled: ended, for good."""

NO_ANSWER = msgspec.Raw(b"null")


class StageTimes(Struct, frozen=True, array_like=True):
    """Milliseconds a job spent in each stage of its batch; waited_ms: from submit to its worker's start."""

    waited_ms: float = 0.0
    load_ms: float = 0.0
    decode_ms: float = 0.0
    run_ms: float = 0.0
    store_ms: float = 0.0


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job's state as seen from outside.

    answer: JSON, null when there is none or it is an object (ref). code, message: why it failed.
    fingerprint: set when the job has an idempotency key. Times in seconds since the epoch.
    """

    job_id: str
    status: Status
    tenant: str
    model: str
    version: int | None = None
    answer: msgspec.Raw = NO_ANSWER
    ref: Ref | None = None
    code: str | None = None
    message: str | None = None
    attempts: int = 0
    submitted_at: float = 0.0
    finished_at: float | None = None
    times: StageTimes | None = None
    worker: str | None = None
    fingerprint: str | None = None
    trace_id: str | None = None

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "running")

    def json(self) -> Any:
        """The inline answer as Python values; None when there is none."""
        return msgspec.json.decode(self.answer)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Outcome)


def outcome_of(job: Job, status: Status, **facts: Any) -> Outcome:
    return Outcome(
        job_id=job.id,
        status=status,
        tenant=job.tenant,
        model=job.model,
        version=job.version,
        submitted_at=job.submitted_at,
        fingerprint=job.fingerprint if job.key is not None else None,
        trace_id=job.trace_id,
        **facts,
    )


def encode_outcome(outcome: Outcome) -> bytes:
    return _encoder.encode(outcome)


def decode_outcome(value: bytes) -> Outcome:
    return _decoder.decode(value)


def result_headers(outcome: Outcome) -> dict[str, str]:
    """Headers of a result event; its value is `encode_outcome(outcome)`."""
    return {
        "ce_specversion": SPEC_VERSION,
        "ce_type": RESULT_TYPE,
        "ce_source": "/dispatcher",
        "ce_id": outcome.job_id,
        "ce_time": rfc3339(outcome.finished_at or 0.0),
        "content-type": "application/json",
        "ce_tenant": outcome.tenant,
        "ce_model": outcome.model,
        "ce_status": outcome.status,
    }
