"""What is written here, the CloudEvents project's own library reads; what it writes, is read here."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from cloudevents.core.bindings.kafka import (
    KafkaMessage,
    from_kafka_event,
    to_binary_event,
    to_structured_event,
)
from cloudevents.core.v1.event import CloudEvent

from schemas.cloudevents import structured_mode
from schemas.jobs import (
    JOB_TYPE,
    Job,
    cancel_headers,
    job_headers,
    job_value,
    read_job,
    retry_headers,
)
from schemas.payloads import Payload, Ref
from schemas.proof import signed
from schemas.results import encode_outcome, outcome_of, result_headers

TEXT = "jobs.text.standard"
SENT_AT = datetime(2027, 1, 15, 8, 0, 0, 250_000, tzinfo=UTC)
FULL: dict[str, Any] = {
    "version": 3,
    "priority": 7,
    "params": {"k": 5},
    "reply_to": "0011",
    "attempt": 1,
    "replay": "redrive-1",
    "foreign": {"ce_subject": "order-7"},
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}


def theirs(headers: dict[str, str], value: bytes) -> Any:
    """The event as the library reads it. It refuses what is not conformant."""
    encoded = {name: text.encode() for name, text in headers.items()}
    return from_kafka_event(KafkaMessage(encoded, None, value))


def ours(message: KafkaMessage) -> Job:
    headers = {name: text.decode() for name, text in message.headers.items()}
    return read_job(TEXT, headers, message.value, 0.0)


# ── ours, read by theirs ─────────────────────────────────────────────────────────────────────────

PAYLOADS = {
    "text": Payload("text/plain", data=b"hello"),
    "image": Payload("image/png", data=bytes(range(256))),
    "json": Payload("application/json", data=b'{"a": 1}'),
    "object": Payload("image/jpeg", ref=Ref("tenants/default/x", 70_000, "0" * 64)),
}
READ = {"text": "hello", "image": bytes(range(256)), "json": {"a": 1}}


@pytest.mark.parametrize("write", [job_headers, retry_headers])
@pytest.mark.parametrize("facts", [{}, FULL], ids=["least", "all"])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_job_is_an_event(
    make_job: Callable[..., Job], kind: str, facts: dict[str, Any], write: Any
) -> None:
    job = signed(make_job(payload=PAYLOADS[kind], **facts), {"default": [b"k" * 32]})

    event = theirs(write(job), job_value(job))

    assert (event.get_id(), event.get_type()) == (job.id, JOB_TYPE)
    assert event.get_source() == "/tenants/default"
    assert event.get_datacontenttype() == PAYLOADS[kind].content_type
    assert event.get_time().timestamp() == job.submitted_at
    assert event.get_extension("model") == "echo"
    assert event.get_data() == READ.get(kind, event.get_data())


@pytest.mark.parametrize("kind", READ)
def test_a_job_in_structured_mode_is_an_event(make_job: Callable[..., Job], kind: str) -> None:
    job = make_job(payload=PAYLOADS[kind], **FULL)

    headers, value = structured_mode(job_headers(job), job_value(job))
    event = theirs({"content-type": headers["content-type"]}, value)

    assert (event.get_id(), event.get_subject()) == (job.id, "order-7")
    assert event.get_data() == READ[kind]


def test_a_result_is_an_event(make_job: Callable[..., Job]) -> None:
    outcome = outcome_of(
        make_job(id="a"), "succeeded", answer=msgspec.Raw(b'{"type":"x"}'), finished_at=1.5
    )

    event = theirs(result_headers(outcome), encode_outcome(outcome))

    assert (event.get_id(), event.get_type()) == ("a", "io.headrace.result.v1")
    assert event.get_source() == "/dispatcher"
    assert event.get_time() == datetime.fromtimestamp(1.5, UTC)
    assert event.get_datacontenttype() == "application/json"
    assert event.get_data()["answer"] == {"type": "x"}


def test_a_cancel_request_is_an_event() -> None:
    event = theirs(cancel_headers("default", "job-1"), b"")

    assert (event.get_type(), event.get_subject()) == ("io.headrace.cancel.v1", "job-1")


# ── theirs, read by ours ─────────────────────────────────────────────────────────────────────────


def their_event(data: Any, content_type: str | None, **more: Any) -> CloudEvent:
    attributes: dict[str, Any] = {
        "id": "job-1",
        "type": JOB_TYPE,
        "source": "/orders/eu",
        "time": SENT_AT,
        "tenant": "acme",
        "model": "echo",
        "deadline": "2027-01-15T09:00:00Z",
        "priority": 7,
        **more,
    }
    if content_type is not None:
        attributes["datacontenttype"] = content_type
    return CloudEvent(attributes, data)


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
@pytest.mark.parametrize(
    ("data", "content_type", "value"),
    [
        ("h\u00e9llo", "text/plain", "h\u00e9llo".encode()),
        (bytes(range(256)), "image/png", bytes(range(256))),
        ({"a": [1, 2]}, "application/json", None),
    ],
)
def test_an_event_is_a_job(
    data: Any, content_type: str, value: bytes | None, write: Callable[..., KafkaMessage]
) -> None:
    job = ours(write(their_event(data, content_type, subject="order-7", myapp="x")))

    assert (job.id, job.tenant, job.model, job.priority) == ("job-1", "acme", "echo", 7)
    assert job.submitted_at == SENT_AT.timestamp()
    assert job.deadline_at == datetime(2027, 1, 15, 9, tzinfo=UTC).timestamp()
    assert job.foreign == {"ce_source": "/orders/eu", "ce_subject": "order-7", "ce_myapp": "x"}
    assert job.payload.content_type == content_type
    carried = job.payload.data or b""
    assert carried == value if value is not None else msgspec.json.decode(carried) == data


def test_a_text_without_a_type_is_its_characters() -> None:
    job = ours(to_structured_event(their_event("hello", None)))

    assert job.payload == Payload("text/plain; charset=utf-8", data=b"hello")
