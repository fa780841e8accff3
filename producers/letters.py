"""One dead letter: what it says, and the job that it is redriven as."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from infra.eventlog import NewRecord, Record
from infra.objects import ObjectStore
from schemas.errors import InvalidJob
from schemas.jobs import (
    DEAD_LETTER_HEADERS,
    HISTORY_HEADERS,
    KEY_LIMIT_CHARS,
    REPLAY,
    SIGNATURE,
    VALUE_DROPPED,
    Job,
    read_job,
    rfc3339,
)
from schemas.payloads import belongs_to
from schemas.proof import TenantKeys, check_proof, signed
from schemas.topics import JOB_TOPICS, RETRY, TOPIC_BY_NAME, dead_letter_topic

HOMES = {
    dead_letter_topic(name): name
    for name in TOPIC_BY_NAME
    if dead_letter_topic(name) in TOPIC_BY_NAME
}
DEAD_LETTER_TOPICS = tuple(HOMES)

LEFT_BEHIND = DEAD_LETTER_HEADERS | HISTORY_HEADERS | {REPLAY, "ce_deadline"}
"""Headers that a redriven job has not got from its letter."""


class DeadLetter(Struct, frozen=True, kw_only=True):
    """What a letter says, without its bytes.

    id: its place in the log, and the replay id of the job it is redriven as. at: when it was written,
    seconds since the epoch. topic: where it goes back to. object: key of a payload that is not in
    the letter. obstacle: why the job could not run if it were redriven; None for most.
    """

    id: str
    at: float
    job: str
    topic: str
    tenant: str
    model: str
    version: int | None
    code: str
    message: str
    attempts: int
    size_bytes: int
    object: str | None
    obstacle: str | None


class Found(NamedTuple):
    letter: DeadLetter
    record: Record


def read_letter(record: Record, keys: TenantKeys) -> DeadLetter:
    """Of a record that is no job, it says what its headers claim."""
    headers = record.headers
    job, obstacle = _job_of(record, keys)
    attempts = headers.get("x-attempt", "")
    ref = job.payload.ref if job else None
    return DeadLetter(
        id="/".join(map(str, record.position)),
        at=record.time,
        job=job.id if job else record.key,
        topic=_home(record),
        tenant=job.tenant if job else _claim(headers, "ce_tenant"),
        model=job.model if job else _claim(headers, "ce_model"),
        version=job.version if job else None,
        code=headers.get("x-error", ""),
        message=headers.get("x-error-message", ""),
        attempts=int(attempts) if attempts.isdecimal() else 0,
        size_bytes=ref.size_bytes if ref else len(record.value),
        object=ref.key if ref else None,
        obstacle=obstacle,
    )


def job_again(found: Found, deadline_at: float, keys: TenantKeys) -> NewRecord:
    """The job of a letter as it was submitted, but for its deadline and the replay id."""
    letter, record = found
    headers = _left(record.headers) | {"ce_deadline": rfc3339(deadline_at), REPLAY: letter.id}
    if SIGNATURE in headers and not letter.obstacle:
        # What was signed is proven by now; its proof covers the deadline, which is another one.
        job = signed(read_job(letter.topic, headers, record.value, record.time), keys)
        headers[SIGNATURE] = job.signature or ""
    return NewRecord(letter.topic, record.key, headers, record.value)


def read_payload(found: Found, objects: ObjectStore) -> bytes:
    """The bytes that the job was submitted with; of a record that is no job, its value.

    Raises InvalidJob (payload_dropped, payload_foreign, object_missing, object_mismatch) and Transient.
    """
    if dropped := _dropped(found.record):
        raise InvalidJob("payload_dropped", dropped)
    job, _ = _job_of(found.record, {})
    if job is None:
        return found.record.value
    if (ref := job.payload.ref) is None:
        return job.payload.data or b""
    if not belongs_to(job.tenant, ref.key):
        raise InvalidJob(
            "payload_foreign",
            f"Expected a payload under the prefix of tenant {job.tenant}, came {ref.key}.",
        )
    return objects.fetch(ref)


def _job_of(record: Record, keys: TenantKeys) -> tuple[Job | None, str | None]:
    """The job that the letter would be redriven as, and what stands in its way."""
    dropped = _dropped(record)
    try:
        job = read_job(_home(record), _left(record.headers), record.value, record.time)
    except InvalidJob as error:
        return None, dropped or error.message
    return job, dropped or _obstacle(job, record, keys)


def _obstacle(job: Job, record: Record, keys: TenantKeys) -> str | None:
    if record.headers.get("x-error") == "idempotency_conflict":
        return "Its idempotency key stands for other work: submit it under a new key."
    if job.signature is None:
        return None
    if job.tenant not in keys:
        return f"It is signed, and no key of tenant {job.tenant} is here to sign its new deadline."
    try:
        check_proof(read_job(job.topic, record.headers, record.value, record.time), keys)
    except InvalidJob as error:
        return error.message
    return None


def _dropped(record: Record) -> str | None:
    if (size := record.headers.get(VALUE_DROPPED)) is None:
        return None
    at = [record.headers.get(f"x-original-{part}") for part in ("topic", "partition", "offset")]
    return (
        f"Its {size} were too many for a dead letter; the record itself is at partition {at[1]}, "
        f"offset {at[2]} of {at[0]}, for as long as that keeps it."
    )


def _home(record: Record) -> str:
    """The topic where the job belongs. Its dead letters are named after it, also if it failed in a retry."""
    topic = HOMES[record.position.topic]
    own = record.headers.get("ce_jobtopic")
    return own if topic == RETRY and own in JOB_TOPICS else topic


def _claim(headers: dict[str, str], name: str) -> str:
    return headers.get(name, "")[:KEY_LIMIT_CHARS]


def _left(headers: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in headers.items() if name not in LEFT_BEHIND}
