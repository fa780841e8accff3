"""Records of strangers on every topic that the dispatcher reads: each is answered or a dead letter with its
reason, and nothing behind it has to wait."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import pytest

from headrace import Client
from infra.eventlog import NewRecord
from schemas.cloudevents import STRUCTURED, structured_mode
from schemas.jobs import (
    FOREIGN_LIMIT_BYTES,
    Job,
    cancel_headers,
    job_headers,
    job_value,
    new_job_id,
    retry_headers,
)
from schemas.payloads import Payload, Ref
from schemas.proof import signature, signed
from schemas.results import decode_outcome
from schemas.topics import CONTROL, JOB_TOPICS, RETRY, dead_letter_topic

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = [
    pytest.mark.timeout(600),  # the first test brings the stack up and may download models
    pytest.mark.usefixtures("the_stack_lives_on"),
]

ONE = np.zeros(1, np.float32)
READ_TOPICS = (*JOB_TOPICS, RETRY, CONTROL)
TENSOR = "jobs.tensor.standard"
TWO_MIB = bytes(2 * 1024 * 1024)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def make_job(**facts: Any) -> Job:
    """A job for noop that gives its input back, due in ten minutes."""
    facts.setdefault("id", new_job_id("default"))
    facts.setdefault("tenant", "default")
    facts.setdefault("payload", Payload("application/x-npy", data=npy(ONE)))
    now = time.time()
    return Job(topic=TENSOR, model="noop", submitted_at=now, deadline_at=now + 600, **facts)


def submit(stack: Stack, client: Client, *records: NewRecord) -> None:
    """Append, and wait until the dispatcher has dealt with everything."""
    client.log.append(list(records))
    stack.until(lambda: not stack.lag())


def record_of(job: Job, **changes: str) -> NewRecord:
    return NewRecord(job.topic, job.id, job_headers(job) | changes, job_value(job))


# ── what is no job, on every topic ───────────────────────────────────────────────────────────────


class Bad(NamedTuple):
    """changes: of the headers of a good record; None leaves one out. words: of the reason."""

    changes: dict[str, str | None]
    value: bytes
    words: str


BAD = {
    "no headers": Bad({}, b"\xff\x00garbage", "Header ce_"),
    "large garbage": Bad({}, TWO_MIB, "Header ce_"),
    "no version of CloudEvents": Bad({"ce_specversion": None}, b"", "ce_specversion: expected 1.0"),
    "another version of CloudEvents": Bad({"ce_specversion": "0.3"}, b"", "came '0.3'"),
    "another version of ours": Bad({"ce_type": "v9"}, b"", "v1, came 'io.headrace."),
    "a structured event that is none": Bad(
        {"content-type": STRUCTURED}, b"\xff{", "one CloudEvent"
    ),
    "a batch of events": Bad(
        {"content-type": "application/cloudevents-batch+json"}, b"[]", "expected application/cloud"
    ),
}


def bad_record(topic: str, bad: Bad) -> NewRecord:
    key = new_job_id("default")
    job = make_job(id=key)
    good = cancel_headers("default", key) if topic == CONTROL else retry_headers(job)
    changes = dict(bad.changes)
    if changes.get("ce_type"):
        changes["ce_type"] = good["ce_type"].replace("v1", "v9")
    headers = {name: text for name, text in (good | changes).items() if text is not None}
    return NewRecord(topic, key, headers if changes else {}, bad.value)


@pytest.mark.parametrize("name", BAD)
def test_on_every_topic_it_is_a_dead_letter_with_the_reason(
    stack: Stack, client: Client, name: str
) -> None:
    bad = BAD[name]
    records = [bad_record(topic, bad) for topic in READ_TOPICS]

    submit(stack, client, *records)

    letters = stack.records(*map(dead_letter_topic, READ_TOPICS))
    found = {letter.key: letter for letter in letters}
    for record in records:
        letter = found[record.key]
        assert letter.position.topic == dead_letter_topic(record.topic)
        assert letter.headers["x-original-topic"] == record.topic
        assert letter.headers["x-error"] == "record_malformed"
        assert bad.words in letter.headers["x-error-message"]
        assert record.headers.items() <= letter.headers.items()
        assert letter.value == record.value
    assert {record.key for record in records}.isdisjoint(r.key for r in stack.records("results"))


def test_a_control_event_of_a_kind_that_nobody_knows_is_passed_over(
    stack: Stack, client: Client
) -> None:
    """`control` carries more than cancel requests, and a dispatcher may be older than what is sent."""
    headers = cancel_headers("default", "k") | {"ce_type": "com.example.sunrise"}

    submit(stack, client, NewRecord(CONTROL, "passed-over", headers, b""))

    assert stack.dead_letters("passed-over") == []


def test_more_headers_than_can_be_kept_are_a_dead_letter(stack: Stack, client: Client) -> None:
    record = record_of(make_job(), app="x" * FOREIGN_LIMIT_BYTES)

    submit(stack, client, record)

    (letter,) = stack.dead_letters(record.key)
    assert letter.headers["x-error"] == "record_malformed"
    assert f"at most {FOREIGN_LIMIT_BYTES} bytes" in letter.headers["x-error-message"]


def test_a_job_of_two_mebibytes_for_a_small_model_fails(stack: Stack, client: Client) -> None:
    payload = Payload("application/x-npy", data=TWO_MIB)
    record = record_of(make_job(payload=payload), ce_model="small")

    submit(stack, client, record)

    (result,) = stack.results(record.key)
    assert decode_outcome(result.value).code == "payload_too_large"


# ── what is unusual, and a job ───────────────────────────────────────────────────────────────────


def test_a_structured_job_runs(stack: Stack, client: Client) -> None:
    job = make_job(payload=Payload("application/x-npy", data=npy(np.arange(3, dtype=np.float32))))
    headers, value = structured_mode(job_headers(job), job_value(job))

    submit(stack, client, NewRecord(TENSOR, job.id, headers, value))

    (result,) = stack.results(job.id)
    assert client.result_of(decode_outcome(result.value)).answer["outputs"] == {
        "y": [0.0, 1.0, 2.0]
    }


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_a_dead_letter_has_the_headers_that_its_producer_sent(
    stack: Stack, client: Client, mode: str
) -> None:
    foreign = {"ce_source": "/orders/eu", "ce_subject": "order-7", "My-App": "caf\u00e9"}
    order = json.dumps({"fail": "as told"}).encode()
    job = make_job(payload=Payload("application/json", data=order), foreign=foreign)
    job = msgspec.structs.replace(job, model="obey")
    headers, value = job_headers(job), job_value(job)
    if mode == "structured":
        headers, value = structured_mode(headers, value)

    submit(stack, client, NewRecord(TENSOR, job.id, headers, value))

    (letter,) = stack.dead_letters(job.id)
    assert foreign.items() <= letter.headers.items()
    assert letter.value == order


# ── whose job it is ──────────────────────────────────────────────────────────────────────────────

KEYS = {"default": [b"a-secret-of-the-default-tenant"], "acme": [b"a-secret-of-the-tenant-acme"]}


@pytest.fixture(scope="module")
def strict(
    make_stack: Callable[..., Stack], make_tensor_bundle: Callable[..., Path]
) -> Iterator[Stack]:
    """A stack that takes only jobs whose tenant is proven."""
    keys = json.dumps({tenant: own[0].decode() for tenant, own in KEYS.items()})
    stack = make_stack(TENANTS__REQUIRE_PROOF="true", TENANTS__KEYS=keys)
    stack.headrace("models", "add", make_tensor_bundle("noop"))
    stack.up()
    yield stack
    stack.down()


@pytest.fixture
def strict_client(strict: Stack, monkeypatch: pytest.MonkeyPatch) -> Client:
    """It has its own tenant's key, and signs."""
    monkeypatch.setenv("HEADRACE_TENANTS__KEYS", json.dumps({"acme": KEYS["acme"][0].decode()}))
    return strict.client(tenant="acme")


def forged_by_acme(job: Job) -> Job:
    """acme has a key, and says that it is somebody else."""
    return msgspec.structs.replace(job, signature=signature(job, KEYS["acme"][0]))


FORGED: dict[str, Callable[[], Job]] = {
    "no proof": make_job,
    "the proof of another tenant": lambda: forged_by_acme(make_job()),
    "the proof of another job": lambda: msgspec.structs.replace(
        make_job(), signature=signed(make_job(), KEYS).signature
    ),
    "a later deadline than was signed": lambda: msgspec.structs.replace(
        signed(make_job(), KEYS), deadline_at=time.time() + 3600
    ),
    "a tenant without a key": lambda: msgspec.structs.replace(
        forged_by_acme(make_job()), tenant="nobody"
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_job_whose_tenant_is_not_proven_is_a_dead_letter_and_has_no_outcome(
    strict: Stack, strict_client: Client, name: str
) -> None:
    job = FORGED[name]()

    submit(strict, strict_client, record_of(job))

    (letter,) = strict.dead_letters(job.id)
    assert letter.headers["x-error"] == "tenant_unproven"
    assert f"of tenant {job.tenant}" in letter.headers["x-error-message"]
    assert strict.results(job.id) == []


def test_a_client_with_its_tenants_key_is_believed(strict_client: Client) -> None:
    assert strict_client.submit("noop", ONE).result().version == 1


def test_a_forged_record_does_not_touch_the_job_whose_name_it_bears(
    strict: Stack, strict_client: Client
) -> None:
    job = signed(make_job(tenant="acme"), KEYS)
    before = record_of(msgspec.structs.replace(job, signature=None), ce_deadline="2020-01-01")
    after = record_of(msgspec.structs.replace(job, tenant="default"))

    submit(strict, strict_client, before, record_of(job), after)

    (result,) = strict.results(job.id)
    assert decode_outcome(result.value).status == "succeeded"
    codes = [letter.headers["x-error"] for letter in strict.dead_letters(job.id)]
    assert codes == ["tenant_unproven"] * 2


def test_a_proven_tenant_has_no_right_to_anothers_payload(
    strict: Stack, strict_client: Client
) -> None:
    ref = Ref("tenants/default/payloads/secret", 10, "0" * 64)
    job = signed(make_job(tenant="acme", payload=Payload("application/x-npy", ref=ref)), KEYS)

    submit(strict, strict_client, record_of(job))

    (result,) = strict.results(job.id)
    assert decode_outcome(result.value).code == "payload_foreign"
