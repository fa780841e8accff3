"""The document says what the code does: every topic, every header, and examples that are records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import header_schemas
from schemas.asyncapi import JOB, LARGE, OUTCOME, document
from schemas.cloudevents import structured_mode
from schemas.jobs import (
    ATTRIBUTE_HEADERS,
    DEAD_LETTER_HEADERS,
    HISTORY_HEADERS,
    OWN_HEADERS,
    Job,
    cancel_headers,
    job_headers,
    job_value,
    new_job_id,
    new_traceparent,
    read_cancel,
    read_job,
    retry_headers,
)
from schemas.payloads import Payload, Ref
from schemas.proof import signature, signed
from schemas.results import Status, encode_outcome, outcome_of, result_headers
from schemas.topics import JOB_TOPICS, RETRY, TOPIC_BY_NAME

DOCUMENT = document("1.2.3")
MESSAGES = DOCUMENT["components"]["messages"]


def conforms(part: str, message: str, value: object) -> None:
    """Raises ValidationError unless a value is as the message's headers or payload should be."""
    schema = MESSAGES[message][part] | {"components": DOCUMENT["components"]}
    jsonschema.Draft7Validator(schema).validate(value)


def example(message: str, name: str) -> tuple[dict[str, str], Any]:
    (found,) = (one for one in MESSAGES[message]["examples"] if one["name"] == name)
    return found["headers"], found["payload"]


# ── nothing is left out ──────────────────────────────────────────────────────────────────────────


def test_each_topic_is_a_channel_with_its_retention() -> None:
    channels = DOCUMENT["channels"]

    assert channels.keys() == TOPIC_BY_NAME.keys()
    for name, channel in channels.items():
        kept = channel["bindings"]["kafka"]["topicConfiguration"]["retention.ms"]
        assert kept == TOPIC_BY_NAME[name].retention_s * 1000
        assert TOPIC_BY_NAME[name].writers in channel["description"]


def test_what_the_dispatcher_reads_it_receives_and_what_it_writes_it_sends() -> None:
    operations = DOCUMENT["operations"]

    assert {f"receive.{name}" for name in (*JOB_TOPICS, RETRY, "control")} <= operations.keys()
    assert {f"send.{name}" for name in (RETRY, "results", "control.dlq")} <= operations.keys()
    assert "send.jobs.text.bulk" not in operations
    assert "receive.results" not in operations


def test_each_header_that_means_something_is_described() -> None:
    described = header_schemas.JOB | header_schemas.HISTORY | header_schemas.REASON

    assert described.keys() == OWN_HEADERS | {"ce_source"}
    assert header_schemas.HISTORY.keys() == HISTORY_HEADERS
    assert header_schemas.REASON.keys() == DEAD_LETTER_HEADERS
    assert header_schemas.JOB.keys() >= ATTRIBUTE_HEADERS


# ── its examples are records ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_has_examples_that_are_as_it_says(message: str) -> None:
    assert MESSAGES[message]["examples"]
    for one in MESSAGES[message]["examples"]:
        conforms("headers", message, one["headers"])
        conforms("payload", message, one["payload"])


@pytest.mark.parametrize(("name", "job"), [("text", JOB), ("largeImage", LARGE)])
def test_the_examples_of_jobs_are_jobs(name: str, job: Job) -> None:
    headers, payload = example("job", name)

    assert read_job(job.topic, headers, payload.encode(), 0.0) == job


def test_the_example_of_a_structured_job_is_the_same_job() -> None:
    headers, payload = example("structuredJob", "text")

    assert read_job(JOB.topic, headers, msgspec.json.encode(payload), 0.0) == JOB


def test_the_example_of_a_retry_is_a_job() -> None:
    headers, payload = example("retry", "text")

    assert read_job(RETRY, headers, payload.encode(), 0.0) == JOB


def test_the_example_of_a_result_is_an_outcome() -> None:
    headers, payload = example("result", "succeeded")

    assert headers == result_headers(OUTCOME)
    assert payload == msgspec.json.decode(encode_outcome(OUTCOME))


def test_the_example_of_a_cancel_request_is_one() -> None:
    headers, payload = example("cancel", "cancel")

    assert read_cancel(JOB.id, headers, payload.encode()) == JOB.id


def test_the_example_of_a_dead_letter_can_be_read_as_a_job_again() -> None:
    headers, payload = example("deadLetter", "failed")

    assert read_job(LARGE.topic, headers, payload.encode(), 0.0) == LARGE


# ── what is written is as it says ────────────────────────────────────────────────────────────────

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
payloads = st.builds(Payload, words, data=st.binary(max_size=64)) | st.builds(
    Payload, words, ref=st.builds(Ref, words, st.integers(0, 2**40), st.just("a" * 64))
)
jobs = st.builds(
    Job,
    id=st.builds(new_job_id, st.just("acme")),
    topic=st.sampled_from(JOB_TOPICS),
    tenant=st.just("acme"),
    model=words,
    payload=payloads,
    submitted_at=st.floats(0, 4e9),
    deadline_at=st.floats(0, 4e9),
    version=st.none() | st.integers(0, 10**15 - 1),
    priority=st.integers(0, 9),
    key=st.none() | words,
    params=st.dictionaries(words, words, max_size=2),
    reply_to=st.none() | words,
    traceparent=st.none() | st.builds(new_traceparent),
    replay=st.none() | words,
    attempt=st.integers(0, 9),
    suspect=st.booleans(),
    not_before=st.floats(0, 4e9),
    waits_for=st.none() | words,
)


@settings(deadline=None)
@given(jobs)
def test_a_job_that_is_written_is_as_the_document_says(job: Job) -> None:
    job = signed(job, {"acme": [b"k" * 32]})
    event_headers, event = structured_mode(job_headers(job), job_value(job))

    conforms("headers", "job", job_headers(job))
    conforms("headers", "retry", retry_headers(job))
    conforms("headers", "structuredJob", event_headers)
    conforms("payload", "structuredJob", msgspec.json.decode(event))


@pytest.mark.parametrize("status", ["succeeded", "failed", "expired", "cancelled"])
def test_a_result_that_is_written_is_as_the_document_says(
    make_job: Callable[..., Job], status: Status
) -> None:
    outcome = outcome_of(make_job(), status, ref=Ref("k", 1, "0"), times=OUTCOME.times)

    conforms("headers", "result", result_headers(outcome))
    conforms("payload", "result", msgspec.json.decode(encode_outcome(outcome)))


def test_a_cancel_request_that_is_written_is_as_the_document_says() -> None:
    conforms("headers", "cancel", cancel_headers("acme", "job-1"))


@pytest.mark.parametrize(
    "changes", [{"ce_type": "io.headrace.job.v9"}, {"ce_id": "a b"}, {"ce_specversion": "0.3"}]
)
def test_what_would_be_refused_is_not_as_the_document_says(changes: dict[str, str]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        conforms("headers", "job", job_headers(JOB) | changes)


def test_a_result_of_another_shape_is_not_as_the_document_says() -> None:
    wrong = msgspec.json.decode(encode_outcome(OUTCOME)) | {"ref": ["key", "not a size", "0"]}

    with pytest.raises(jsonschema.ValidationError):
        conforms("payload", "result", wrong)


# ── the documentation for people ─────────────────────────────────────────────────────────────────

EVENTS = (Path(__file__).parents[3] / "docs" / "events.md").read_text("utf-8")


@pytest.mark.parametrize("header", sorted(OWN_HEADERS | {"ce_source", "ce_status"}))
def test_each_header_is_in_the_documentation(header: str) -> None:
    assert f"`{header}`" in EVENTS


def test_the_documented_signature_is_right() -> None:
    key = b"the-key-that-acme-signs-with"
    lines = [JOB.tenant, JOB.id, "1800003600250000", JOB.payload.sha256, JOB.model]

    assert f"`{key.decode()}`" in EVENTS
    assert "\n".join(["```", *lines, "```"]) in EVENTS
    assert f"`{signature(JOB, key)}`" in EVENTS
