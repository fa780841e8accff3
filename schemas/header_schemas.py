"""What each header on the log is, as JSON Schema: for the AsyncAPI document and the tests of its truth."""

from __future__ import annotations

from typing import Any

from schemas.cloudevents import SPEC_VERSION, STRUCTURED
from schemas.jobs import (
    CANCEL_TYPE,
    JOB_ID,
    JOB_TYPE,
    KEY_LIMIT_CHARS,
    PARAMS_LIMIT_BYTES,
    PRIORITIES,
    TENANT,
    TRACEPARENT,
)
from schemas.payloads import INLINE_LIMIT_BYTES
from schemas.results import RESULT_TYPE
from schemas.topics import JOB_TOPICS

Json = dict[str, Any]
WHOLE = "[0-9]{1,15}"
"""A whole number, as text."""


def _text(description: str, **more: Any) -> Json:
    return {"type": "string", "description": description, **more}


def _matching(pattern: str, description: str) -> Json:
    return _text(description, pattern=f"^({pattern})$")


def _time(description: str) -> Json:
    return _text(description, format="date-time")


JOB_REQUIRED = ["ce_specversion", "ce_type", "ce_id", "ce_tenant", "ce_model"]
JOB: Json = {
    "ce_specversion": _text("Of CloudEvents.", const=SPEC_VERSION),
    "ce_type": _text("What the record is.", const=JOB_TYPE),
    "ce_id": _matching(JOB_ID.pattern, "The job id, which is the record's key too."),
    "ce_tenant": _matching(TENANT.pattern, "Whose job it is."),
    "ce_model": _text("Name of the model.", minLength=1),
    "ce_source": _text("Who sent it. Kept. Without it: /tenants/ and the tenant.", minLength=1),
    "ce_time": _time("When it was submitted. Without it: when it was appended."),
    "ce_deadline": _time("Afterwards it is not run. Without it: a day after it was submitted."),
    "content-type": _text("The payload's own type, a hint: the bytes decide."),
    "ce_modelversion": _matching(WHOLE, "Without it: the newest, or as a rollout has it."),
    "ce_priority": _matching(
        WHOLE, f"0 to {PRIORITIES.stop - 1}, higher first within the lane. Without it: 0."
    ),
    "ce_idempotencykey": _text(
        "Submitting the same work twice under one key makes one job; its id comes of tenant and key.",
        minLength=1,
        maxLength=KEY_LIMIT_CHARS,
    ),
    "ce_params": _text(
        f"A JSON object for the model's steps, at most {PARAMS_LIMIT_BYTES} bytes.",
        maxLength=PARAMS_LIMIT_BYTES,
    ),
    "ce_replyto": _text(
        "The client to notify of the outcome.", minLength=1, maxLength=KEY_LIMIT_CHARS
    ),
    "ce_traceparent": _matching(TRACEPARENT.pattern, "W3C trace context."),
    "ce_dataref": _text(
        f"Key of the payload in the object store, under the tenant's prefix; for payloads over "
        f"{INLINE_LIMIT_BYTES} bytes. The value is empty then, and the next two are required."
    ),
    "ce_datasize": _matching(WHOLE, "Bytes of the object."),
    "ce_datasha256": _matching("[0-9a-f]{64}", "SHA-256 of the object."),
    "x-headrace-signature": _text(
        "Proof of the tenant: v1= and an HMAC-SHA256 in hex.", maxLength=KEY_LIMIT_CHARS
    ),
    "x-replay-id": _text(
        "Which redrive of a dead letter this is.", minLength=1, maxLength=KEY_LIMIT_CHARS
    ),
}
HISTORY_REQUIRED = ["ce_jobtopic", "ce_attempt", "ce_suspect", "ce_notbefore"]
HISTORY: Json = {
    "ce_jobtopic": _text("Where the job was first appended.", enum=list(JOB_TOPICS)),
    "ce_attempt": _matching(WHOLE, "Failed attempts so far."),
    "ce_suspect": _text("1: was being run when a worker died.", enum=["0", "1"]),
    "ce_notbefore": _time("Not run before."),
    "ce_waitsfor": _text(
        "Code of the error that keeps it from being run: docs/job-errors.md. Such a run is no attempt.",
        minLength=1,
    ),
}
REASON_REQUIRED = [
    "x-original-topic",
    "x-original-partition",
    "x-original-offset",
    "x-attempt",
    "x-error",
    "x-error-message",
]
REASON: Json = {
    "x-original-topic": _text("The record's topic."),
    "x-original-partition": _matching(WHOLE, "The record's partition."),
    "x-original-offset": _matching(WHOLE, "The record's offset."),
    "x-attempt": _matching(WHOLE, "Attempts made."),
    "x-error": _text("Code of the error: docs/job-errors.md."),
    "x-error-message": _text("What was expected, what came, what to do."),
    "x-value-dropped": _text("How large the value was, where it was too large for a dead letter."),
}
RESULT: Json = {
    "ce_specversion": _text("Of CloudEvents.", const=SPEC_VERSION),
    "ce_type": _text("What the record is.", const=RESULT_TYPE),
    "ce_source": _text("Who decided.", const="/dispatcher"),
    "ce_id": _matching(JOB_ID.pattern, "The job id, which is the record's key too."),
    "ce_time": _time("When the job ended."),
    "content-type": _text("Of the value.", const="application/json"),
    "ce_tenant": _matching(TENANT.pattern, "Whose job it was."),
    "ce_model": _text("Name of the model."),
    "ce_status": _text("How it ended.", enum=["succeeded", "failed", "expired", "cancelled"]),
}
CANCEL: Json = {
    "ce_specversion": _text("Of CloudEvents.", const=SPEC_VERSION),
    "ce_type": _text("What the record is.", const=CANCEL_TYPE),
    "ce_source": _text("Who asks.", minLength=1),
    "ce_id": _text("Of this request.", minLength=1),
    "ce_time": _time("When it was asked."),
    "ce_subject": _matching(JOB_ID.pattern, "The job id. It is the record's key that counts."),
}
KEY: Json = {
    "fingerprint": _text("Digest of model, params and payload: what the key stands for."),
    "replay": _text("The redrive that was answered."),
}
STRUCTURED_JOB: Json = {
    "content-type": _text(
        "The format of the event; a charset may follow.",
        pattern=f"^{STRUCTURED.replace('+', '[+]')}",
    ),
    "x-headrace-signature": JOB["x-headrace-signature"],
}


def event_of(headers: Json) -> Json:
    """The same attributes as members of a structured event, where whole numbers may be numbers too."""
    members = {}
    for name, schema in headers.items():
        if name.startswith("ce_"):
            whole = WHOLE in schema.get("pattern", "")
            members[name.removeprefix("ce_")] = (
                schema | {"type": ["string", "integer"]} if whole else schema
            )
    return members
