"""The proof that a job is its tenant's: an HMAC under a key that only the tenant and the dispatcher have."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from schemas.errors import InvalidJob
from schemas.jobs import SIGNATURE, Job

TenantKeys = Mapping[str, Sequence[bytes]]
"""By tenant. The first key signs; all of them are accepted, so that a key can be changed while jobs come."""

_VERSION = "v1"
_EPOCH = datetime.fromtimestamp(0, UTC)


def signature(job: Job, key: bytes) -> str:
    """`v1=` and hex digits: HMAC-SHA256 of what the job is, whose, and until when.

    Five lines of UTF-8, no line end after the last: tenant, job id, deadline in microseconds since the
    epoch, SHA-256 of the payload in hex, model. The model is last: it alone may hold a line end.
    """
    deadline = (datetime.fromtimestamp(job.deadline_at, UTC) - _EPOCH) // timedelta(microseconds=1)
    lines = (job.tenant, job.id, str(deadline), job.payload.sha256, job.model)
    digest = hmac.new(key, "\n".join(lines).encode(), hashlib.sha256).hexdigest()
    return f"{_VERSION}={digest}"


def signed(job: Job, keys: TenantKeys) -> Job:
    """The job with its tenant's signature; as it was where the tenant has no key."""
    own = keys.get(job.tenant)
    return msgspec.structs.replace(job, signature=signature(job, own[0])) if own else job


def check_proof(job: Job, keys: TenantKeys) -> None:
    """Raises InvalidJob (tenant_unproven)."""
    if job.signature is None:
        raise _unproven(job, "came none")
    if not (own := keys.get(job.tenant)):
        raise _unproven(job, "the dispatcher has no key of this tenant")
    given = job.signature.encode()
    matches = [hmac.compare_digest(signature(job, key).encode(), given) for key in own]
    if not any(matches):
        raise _unproven(
            job,
            "came one of another key, tenant, id, deadline, payload or model; a signed job states "
            "its deadline",
        )


def _unproven(job: Job, came: str) -> InvalidJob:
    return InvalidJob(
        "tenant_unproven",
        f"Expected in {SIGNATURE} a proof that the job is of tenant {job.tenant}, {came}.",
    )
