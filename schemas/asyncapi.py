"""The AsyncAPI 3 document of the event log: what anybody needs who writes or reads its topics from elsewhere.

Made of what the code itself uses: topics, header names, limits, the outcome's type. Its examples are records.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import msgspec

from schemas import header_schemas as headers
from schemas.cloudevents import STRUCTURED, structured_mode
from schemas.header_schemas import Json
from schemas.jobs import (
    FOREIGN_LIMIT_BYTES,
    Job,
    cancel_headers,
    job_headers,
    job_value,
    retry_headers,
)
from schemas.payloads import Payload, Ref
from schemas.results import Outcome, StageTimes, encode_outcome, outcome_of, result_headers
from schemas.topics import (
    CONTROL,
    JOB_TOPICS,
    KEYS,
    RESULTS,
    RETRY,
    TOPICS,
    Topic,
)

ABOUT = f"""\
Jobs for inference come in on the jobs topics, and each ends as exactly one record on `results`.

Records are CloudEvents in Kafka's binary mode: attributes are headers, the payload is the value. Jobs are
accepted in structured mode too. Headers that headrace does not know are ignored, and kept through retries and
dead letters, up to {FOREIGN_LIMIT_BYTES} bytes of them.

The key of a record is the job id, and all topics have the same number of partitions: with Kafka's own
partitioner (murmur2) everything about a job lies in partitions of the same number."""

JOB = Job(
    id="01999f3c-8c00-7000-8000-000000000001",
    topic="jobs.text.standard",
    tenant="acme",
    model="minilm-topics",
    payload=Payload("text/plain; charset=utf-8", data=b"The river rose by two metres overnight."),
    submitted_at=1_800_000_000.25,
    deadline_at=1_800_003_600.25,
    foreign={"ce_source": "/orders/eu"},
)
LARGE = msgspec.structs.replace(
    JOB,
    payload=Payload("image/jpeg", ref=Ref("tenants/acme/payloads/photo.1", 70_000, "0" * 64)),
    topic="jobs.image.standard",
    model="efficientnet-lite0",
    version=1,
)
OUTCOME = outcome_of(
    LARGE,
    "succeeded",
    answer=msgspec.Raw(b'{"type":"classification","label":"espresso","probability":0.95}'),
    attempts=1,
    finished_at=1_800_000_000.5,
    times=StageTimes(20.0, 1.0, 4.0, 9.0, 0.0),
    worker="worker-0",
)
FAILED = "Expected a whole JPEG, PNG, WebP, GIF, BMP or TIFF image, came 39 bytes of text."


def document(version: str) -> Json:
    """The whole document, of plain values. version: of headrace."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "headrace event log",
            "version": version,
            "description": ABOUT,
            "license": {"name": "Apache-2.0"},
        },
        "servers": {
            "kafka": {
                "host": "{address}",
                "protocol": "kafka",
                "description": "Apache Kafka, 2.5 or newer, with topics made by `headrace topics apply`.",
                "variables": {"address": {"default": "localhost:9092"}},
            }
        },
        "channels": {topic.name: _channel(topic) for topic in TOPICS},
        "operations": dict(_operation(topic, way) for topic in TOPICS for way in _ways(topic)),
        "components": {"messages": MESSAGES, "schemas": _schemas()},
    }


# ── channels and operations ──────────────────────────────────────────────────────────────────────


def _messages_of(topic: Topic) -> tuple[str, ...]:
    if topic.name in JOB_TOPICS:
        return ("job", "structuredJob")
    own = {RETRY: "retry", RESULTS: "result", KEYS: "key", CONTROL: "cancel"}
    return (own.get(topic.name, "deadLetter"),)


def _channel(topic: Topic) -> Json:
    retention_ms = int(topic.retention_s * 1000)
    return {
        "address": topic.name,
        "title": topic.name,
        "description": f"{topic.about[:1].upper()}{topic.about[1:]}. Written by {topic.writers}, "
        f"read by {topic.readers}. Key: the job id. Kept for {topic.retention_s / 86400:g} days.",
        "messages": {
            name: {"$ref": f"#/components/messages/{name}"} for name in _messages_of(topic)
        },
        "bindings": {
            "kafka": {
                "topicConfiguration": {"cleanup.policy": ["delete"], "retention.ms": retention_ms},
                "bindingVersion": "0.5.0",
            }
        },
    }


def _ways(topic: Topic) -> list[str]:
    """What headrace itself does with a topic; whoever is on the other side does the reverse."""
    ways = {"receive": topic.readers, "send": topic.writers}
    return [way for way, who in ways.items() if "dispatcher" in who]


def _operation(topic: Topic, way: str) -> tuple[str, Json]:
    channel = f"#/channels/{topic.name}"
    return f"{way}.{topic.name}", {
        "action": way,
        "summary": f"The dispatcher {way}s {topic.about}.",
        "channel": {"$ref": channel},
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in _messages_of(topic)],
    }


# ── messages ─────────────────────────────────────────────────────────────────────────────────────


def _object(properties: Json, required: list[str], **more: Any) -> Json:
    return {"type": "object", "properties": properties, "required": required, **more}


def _message(summary: str, headers: Json, payload: Json, **more: Any) -> Json:
    key = {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$", "description": "The job id."}
    return {
        "summary": summary,
        "headers": headers,
        "payload": payload,
        "bindings": {"kafka": {"key": key, "bindingVersion": "0.5.0"}},
        **more,
    }


def _example(name: str, headers: dict[str, str], value: bytes, *, json: bool = False) -> Json:
    payload = msgspec.json.decode(value) if json else value.decode()
    return {"name": name, "headers": headers, "payload": payload}


def _dead_letter_headers(job: Job) -> dict[str, str]:
    return job_headers(job) | {
        "x-original-topic": job.topic,
        "x-original-partition": "3",
        "x-original-offset": "1042",
        "x-attempt": "1",
        "x-error": "image_unreadable",
        "x-error-message": FAILED,
    }


BYTES: Json = {"type": "string", "format": "binary", "description": "The payload, untouched."}
EMPTY: Json = {"type": "string", "maxLength": 0}
JOB_HEADERS = _object(headers.JOB, headers.JOB_REQUIRED)
JOB_EVENT = _object(
    headers.event_of(headers.JOB)
    | {
        "datacontenttype": {"type": "string", "description": "The payload's own type."},
        "data": {"description": "The payload: a text as a string, or JSON as it is."},
        "data_base64": {"type": "string", "description": "The payload, when it is neither."},
    },
    [name.removeprefix("ce_") for name in headers.JOB_REQUIRED],
)

MESSAGES: Json = {
    "job": _message(
        "A submitted job, in binary mode.",
        JOB_HEADERS,
        BYTES,
        examples=[
            _example("text", job_headers(JOB), job_value(JOB)),
            _example("largeImage", job_headers(LARGE), job_value(LARGE)),
        ],
    ),
    "structuredJob": _message(
        "A submitted job, in structured mode.",
        _object(headers.STRUCTURED_JOB, ["content-type"]),
        JOB_EVENT,
        contentType=STRUCTURED,
        examples=[
            _example("text", *structured_mode(job_headers(JOB), job_value(JOB)), json=True),
        ],
    ),
    "retry": _message(
        "A job to run again, with what happened so far. Believed only here.",
        _object(headers.JOB | headers.HISTORY, [*headers.JOB_REQUIRED, *headers.HISTORY_REQUIRED]),
        BYTES,
        examples=[_example("text", retry_headers(JOB), job_value(JOB))],
    ),
    "result": _message(
        "The one outcome of a job, however it ended. After a redrive a later one, which counts.",
        _object(headers.RESULT, list(headers.RESULT)),
        {"$ref": "#/components/schemas/Outcome"},
        contentType="application/json",
        examples=[
            _example("succeeded", result_headers(OUTCOME), encode_outcome(OUTCOME), json=True)
        ],
    ),
    "key": _message(
        "What an idempotency key was answered for; or which redrive was.",
        _object(headers.KEY, ["fingerprint"]),
        EMPTY,
        examples=[_example("answered", {"fingerprint": JOB.fingerprint}, b"")],
    ),
    "cancel": _message(
        "A request to cancel a job. Control events of other types are passed over.",
        _object(headers.CANCEL, ["ce_specversion", "ce_type"]),
        EMPTY,
        examples=[
            _example(
                "cancel",
                cancel_headers("acme", JOB.id)
                | {
                    "ce_id": "01999f3c-8c00-7000-8000-000000000002",
                    "ce_time": "2027-01-15T08:00:00Z",
                },
                b"",
            )
        ],
    ),
    "deadLetter": _message(
        "A record as it was, with where from and why. A record that was no job has no other headers.",
        _object(headers.JOB | headers.REASON, headers.REASON_REQUIRED),
        {"description": "The record's value, as it was."},
        examples=[_example("failed", _dead_letter_headers(LARGE), job_value(LARGE))],
    ),
}


# ── schemas ──────────────────────────────────────────────────────────────────────────────────────


def _schemas() -> Json:
    """Of the outcome and what it is made of, in the dialect of AsyncAPI (JSON Schema, draft 7)."""
    event = msgspec.defstruct(
        "Outcome",
        [
            (field.name, Any, None)
            if field.type is msgspec.Raw
            else (field.name, field.type)
            if field.required
            else (field.name, field.type, field.default)
            for field in msgspec.structs.fields(Outcome)
        ],
        kw_only=True,
    )
    _, schemas = msgspec.json.schema_components([event], ref_template="#/components/schemas/{name}")
    schemas["Outcome"] |= {
        "description": cleandoc(Outcome.__doc__ or ""),
        "additionalProperties": True,
    }
    for tuple_type in (Ref, StageTimes):
        names = tuple_type.__struct_fields__
        schema = schemas[tuple_type.__name__]
        items = schema.pop("prefixItems")
        schema["items"] = [{"title": name, **item} for name, item in zip(names, items, strict=True)]
    return schemas
