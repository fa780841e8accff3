"""A job: one submission. On the wire it is a CloudEvent, written in binary mode (attributes are headers,
the payload is the record's value, untouched) and read in either mode.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from schemas.cloudevents import SPEC_VERSION, binary_mode
from schemas.errors import InvalidJob
from schemas.fields import END_OF_TIME as END_OF_TIME
from schemas.fields import Fields, malformed
from schemas.fields import rfc3339 as rfc3339
from schemas.payloads import Payload, Ref
from schemas.topics import JOB_TOPICS, RETRY

JOB_TYPE = "io.headrace.job.v1"
CANCEL_TYPE = "io.headrace.cancel.v1"
JOB_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TENANT = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
KEY_LIMIT_CHARS = 256
SHORT = re.compile(rf"(?s:.){{1,{KEY_LIMIT_CHARS}}}")
PARAMS_LIMIT_BYTES = 16 * 1024
PRIORITIES = range(10)
PARAMS_LIMIT_DEPTH = 32
DEFAULT_DEADLINE_S = 24 * 3600.0
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
FOREIGN_LIMIT_BYTES = 8 * 1024

REPLAY = "x-replay-id"
"""Header of a job that was redriven from the dead letters: which redrive that was."""

SIGNATURE = "x-headrace-signature"
"""Header with the proof of the tenant: schemas/proof.py."""

ATTRIBUTE_HEADERS = frozenset(
    {
        "ce_specversion",
        "ce_type",
        "ce_id",
        "ce_time",
        "ce_tenant",
        "ce_model",
        "ce_modelversion",
        "ce_priority",
        "ce_idempotencykey",
        "ce_params",
        "ce_replyto",
        "ce_deadline",
        "ce_traceparent",
        "ce_dataref",
        "ce_datasize",
        "ce_datasha256",
        "content-type",
    }
)
HISTORY_HEADERS = frozenset(
    {"ce_jobtopic", "ce_attempt", "ce_suspect", "ce_notbefore", "ce_waitsfor"}
)
"""What only the dispatcher writes, and only to the retry topic."""

VALUE_DROPPED = "x-value-dropped"
"""Header of a dead letter whose record was too large to be one: how large its value was."""

DEAD_LETTER_HEADERS = frozenset(
    {
        "x-original-topic",
        "x-original-partition",
        "x-original-offset",
        "x-attempt",
        "x-error",
        "x-error-message",
        VALUE_DROPPED,
    }
)
"""What a dead letter has besides those of the job: where from and why."""

OWN_HEADERS = ATTRIBUTE_HEADERS | HISTORY_HEADERS | DEAD_LETTER_HEADERS | {REPLAY, SIGNATURE}
"""Every header that means something here. Of others, the job carries what it came with."""


class Job(Struct, frozen=True, kw_only=True):
    """One submission, frozen; a later attempt is a changed copy.

    topic: where it was first appended, which fixes modality and lane. version: None until it is pinned.
    priority: 0 to 9, higher first, within its lane. key: the caller's idempotency key.
    reply_to: the client to notify. attempt: failed attempts so far. suspect: was being run when a
    worker died. not_before, submitted_at, deadline_at: seconds since the epoch. waits_for: code of the
    error that keeps it from being run through no fault of its own. replay: which redrive of a dead letter
    this is. signature: proof of the tenant, not checked yet. foreign: the headers that mean nothing here, in
    binary mode's spelling; retries and dead letters keep them.
    """

    id: str
    topic: str
    tenant: str
    model: str
    payload: Payload
    submitted_at: float
    deadline_at: float
    version: int | None = None
    priority: int = 0
    key: str | None = None
    params: dict[str, Any] = {}
    reply_to: str | None = None
    traceparent: str | None = None
    attempt: int = 0
    suspect: bool = False
    not_before: float = 0.0
    waits_for: str | None = None
    replay: str | None = None
    signature: str | None = None
    foreign: dict[str, str] = {}

    @property
    def trace_id(self) -> str | None:
        return self.traceparent.split("-")[1] if self.traceparent else None

    @property
    def fingerprint(self) -> str:
        """What one idempotency key may stand for: the same work, by content."""
        work = msgspec.json.encode([self.model, self.params, self.payload.sha256], order="sorted")
        return hashlib.sha256(work).hexdigest()[:32]


def new_job_id(tenant: str, key: str | None = None) -> str:
    """A UUIDv7, which sorts by time; with an idempotency key, a UUIDv8 made of tenant and key."""
    if key is not None:
        digest = bytearray(hashlib.sha256(f"{tenant}\0{key}".encode()).digest()[:16])
        return _uuid(digest, version=8)
    return _uuid(bytearray((time.time_ns() // 1_000_000).to_bytes(6) + os.urandom(10)), 7)


def _uuid(raw: bytearray, version: int) -> str:
    raw[6] = (raw[6] & 0x0F) | version << 4
    raw[8] = (raw[8] & 0x3F) | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def submitted_near(job_id: str) -> float | None:
    """When a UUIDv7 was made, seconds since the epoch; None for any other id."""
    try:
        parsed = uuid.UUID(job_id)
    except ValueError:
        return None
    return (parsed.int >> 80) / 1000 if parsed.version == 7 else None


def new_traceparent() -> str:
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"


def job_headers(job: Job) -> dict[str, str]:
    """The record's headers; the record's value is `job_value(job)`."""
    headers = {
        "ce_source": _source(job.tenant),
        **job.foreign,
        "ce_specversion": SPEC_VERSION,
        "ce_type": JOB_TYPE,
        "ce_id": job.id,
        "ce_time": rfc3339(job.submitted_at),
        "content-type": job.payload.content_type,
        "ce_tenant": job.tenant,
        "ce_model": job.model,
        "ce_deadline": rfc3339(job.deadline_at),
    }
    if job.version is not None:
        headers["ce_modelversion"] = str(job.version)
    if job.priority:
        headers["ce_priority"] = str(job.priority)
    if job.key is not None:
        headers["ce_idempotencykey"] = job.key
    if job.params:
        headers["ce_params"] = msgspec.json.encode(job.params).decode()
    if job.reply_to:
        headers["ce_replyto"] = job.reply_to
    if job.traceparent:
        headers["ce_traceparent"] = job.traceparent
    if ref := job.payload.ref:
        headers |= {
            "ce_dataref": ref.key,
            "ce_datasize": str(ref.size_bytes),
            "ce_datasha256": ref.sha256,
        }
    if job.replay:
        headers[REPLAY] = job.replay
    if job.signature:
        headers[SIGNATURE] = job.signature
    return headers


def retry_headers(job: Job) -> dict[str, str]:
    """Headers of a job that waits in the retry topic: where it came from and what happened to it."""
    history = {
        "ce_jobtopic": job.topic,
        "ce_attempt": str(job.attempt),
        "ce_suspect": str(int(job.suspect)),
        "ce_notbefore": rfc3339(job.not_before),
    }
    if job.waits_for:
        history["ce_waitsfor"] = job.waits_for
    return job_headers(job) | history


def job_value(job: Job) -> bytes:
    return job.payload.data or b""


def cancel_headers(tenant: str, job_id: str) -> dict[str, str]:
    """Headers of a cancel request on `control`; its key is the job id, its value is empty."""
    return {
        "ce_specversion": SPEC_VERSION,
        "ce_type": CANCEL_TYPE,
        "ce_source": _source(tenant),
        "ce_id": new_job_id(tenant),
        "ce_time": rfc3339(time.time()),
        "ce_subject": job_id,
    }


def read_cancel(key: str, headers: Mapping[str, str], value: bytes) -> str | None:
    """The id of the job that a record on `control` cancels; None for an event of another kind.

    Raises InvalidJob (record_malformed) for what is no event, or a cancel request of another version.
    """
    headers, _ = binary_mode(headers, value)
    field = Fields(headers)
    if field.text("ce_type").rpartition(".")[0] != CANCEL_TYPE.rpartition(".")[0]:
        field.event(headers["ce_type"])
        return None
    field.event(CANCEL_TYPE)
    if not JOB_ID.fullmatch(key):
        raise InvalidJob("record_malformed", f"Key: expected a job id, came {key[:80]!r}.")
    return key


def read_job(topic: str, headers: Mapping[str, str], value: bytes, appended_at: float) -> Job:
    """The job of a record in binary or structured mode; times that are missing count from appended_at.

    Raises InvalidJob (record_malformed) naming the header, what was expected and what came. Attributes
    of a structured event are named as the headers they would be.
    """
    headers, value = binary_mode(headers, value)
    field = Fields(headers)
    field.event(JOB_TYPE)
    tenant = field.text("ce_tenant", TENANT)
    key = field.text("ce_idempotencykey", SHORT) if "ce_idempotencykey" in headers else None
    submitted_at = field.when("ce_time", appended_at)
    job = Job(
        id=field.text("ce_id", JOB_ID) if key is None else new_job_id(tenant, key),
        topic=topic,
        tenant=tenant,
        model=field.text("ce_model")[:KEY_LIMIT_CHARS],
        version=field.number("ce_modelversion", None),
        payload=_payload(field, value),
        submitted_at=submitted_at,
        deadline_at=field.when("ce_deadline", submitted_at + DEFAULT_DEADLINE_S),
        priority=min(max(field.number("ce_priority", 0) or 0, 0), PRIORITIES.stop - 1),
        key=key,
        params=_params(headers.get("ce_params")),
        reply_to=field.text("ce_replyto", SHORT) if "ce_replyto" in headers else None,
        traceparent=_traceparent(headers.get("ce_traceparent")),
        replay=field.text(REPLAY, SHORT) if REPLAY in headers else None,
        signature=field.text(SIGNATURE, SHORT) if SIGNATURE in headers else None,
        foreign=_foreign(headers, tenant),
    )
    return _with_history(job, field) if topic == RETRY else job


def _with_history(job: Job, field: Fields) -> Job:
    """What only the dispatcher writes, and only to its own topic."""
    if (topic := field.headers.get("ce_jobtopic")) not in JOB_TOPICS:
        raise malformed("ce_jobtopic", "a jobs topic", topic)
    return msgspec.structs.replace(
        job,
        topic=topic,
        attempt=field.number("ce_attempt", 0),
        suspect=field.headers.get("ce_suspect") == "1",
        not_before=field.when("ce_notbefore", 0.0),
        waits_for=field.headers.get("ce_waitsfor") or None,
    )


def plain_params(params: Any) -> dict[str, Any]:
    """A caller's params as they will come out of the record. Raises InvalidJob (params_invalid, params_too_large)."""
    try:
        text = msgspec.json.encode(params).decode()
        if len(text) <= PARAMS_LIMIT_BYTES:
            return _params(text)
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error)
    except InvalidJob as error:
        reason = error.message
    else:
        raise InvalidJob(
            "params_too_large",
            f"Expected params of at most {PARAMS_LIMIT_BYTES} bytes as JSON, came {len(text)}.",
        )
    raise InvalidJob(
        "params_invalid",
        f"Expected params that JSON can carry, as an object; came others: {reason}",
    )


def _payload(field: Fields, value: bytes) -> Payload:
    content_type = field.headers.get("content-type") or "application/octet-stream"
    if "ce_dataref" not in field.headers:
        return Payload(content_type, data=value)
    ref = Ref(
        field.text("ce_dataref"),
        field.number("ce_datasize", None) or 0,
        field.text("ce_datasha256", re.compile(r"[0-9a-f]{64}")),
    )
    return Payload(content_type, ref=ref)


def _source(tenant: str) -> str:
    return f"/tenants/{tenant}"


def _foreign(headers: Mapping[str, str], tenant: str) -> dict[str, str]:
    """What is kept of a producer's own headers, its event's source among them."""
    foreign = {name: text for name, text in headers.items() if name not in OWN_HEADERS}
    if foreign.get("ce_source") in ("", _source(tenant)):
        del foreign["ce_source"]
    size = sum(len(name.encode()) + len(text.encode()) for name, text in foreign.items())
    if size > FOREIGN_LIMIT_BYTES:
        raise InvalidJob(
            "record_malformed",
            f"Headers that headrace does not know: expected at most {FOREIGN_LIMIT_BYTES} bytes of "
            f"names and values, came {size}: send less beside the payload.",
        )
    return foreign


def _params(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if len(text) > PARAMS_LIMIT_BYTES:
        raise malformed("ce_params", f"at most {PARAMS_LIMIT_BYTES} bytes", f"{len(text)} bytes")
    try:
        params = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise malformed("ce_params", "a JSON object", text) from None
    if not _is_plain(params, PARAMS_LIMIT_DEPTH):
        expected = f"at most {PARAMS_LIMIT_DEPTH} levels, and whole numbers of at most 64 bits"
        raise malformed("ce_params", expected, text)
    return params


def _is_plain(value: Any, depth: int) -> bool:
    """Whether MessagePack can carry it, from any depth of a stack."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)
    return True


def _traceparent(text: str | None) -> str | None:
    """A bad one costs the trace, not the job."""
    return text if text and TRACEPARENT.fullmatch(text) else None
