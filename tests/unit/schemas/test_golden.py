"""Wire bytes as version 1 wrote them. Later versions must read them, and must not write otherwise
than readers of version 1 understand.

The files in golden/ never change. A new version of a format adds files of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.batches import (
    RUN_BATCH,
    Assignment,
    Batch,
    BatchItem,
    Completion,
    ItemOutcome,
    decode_assignment,
    decode_batch,
    decode_completion,
    encode,
)
from schemas.cloudevents import structured_mode
from schemas.jobs import (
    Job,
    cancel_headers,
    job_headers,
    job_value,
    read_cancel,
    read_job,
    retry_headers,
)
from schemas.payloads import Payload, Ref
from schemas.proof import check_proof
from schemas.results import Outcome, StageTimes, decode_outcome, encode_outcome, result_headers
from schemas.topics import RETRY

GOLDEN = Path(__file__).parent / "golden"
SHA = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
TENANT_KEY = b"the-key-that-acme-signs-with"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LARGE = Ref("tenants/acme/payloads/large.0", 70_000, SHA)

JOB = Job(
    id="48e8a918-213b-8590-aa0d-1ca4f5bfe25a",
    topic="jobs.text.premium",
    tenant="acme",
    model="minilm",
    version=3,
    payload=Payload("text/plain; charset=utf-8", data=b"hello"),
    submitted_at=1_800_000_000.25,
    deadline_at=1_800_003_600.25,
    priority=7,
    key="order-7",
    params={"k": 5, "labels": ["a", "\u00e9"], "scale": 0.5},
    reply_to="0011223344556677",
    traceparent=TRACEPARENT,
)
RETRIED = msgspec.structs.replace(
    JOB,
    payload=Payload("image/jpeg", ref=LARGE),
    attempt=2,
    suspect=True,
    not_before=1_800_000_060.5,
)
WAITING = msgspec.structs.replace(RETRIED, waits_for="engine_not_built")
REDRIVEN = msgspec.structs.replace(
    RETRIED,
    replay="redrive-2027-01-15",
    signature="v1=f7e052d767037c04e00e281509c30bfa57b9dac1f2a2ede734cba396891b40a2",
    foreign={"ce_source": "/orders/eu", "ce_subject": "order-7", "My-App": "caf\u00e9"},
)
OUTCOME = Outcome(
    job_id=JOB.id,
    status="succeeded",
    tenant="acme",
    model="minilm",
    version=3,
    answer=msgspec.Raw(b'{"type":"embedding","vector":[0.5,-1.0],"dimensions":2}'),
    attempts=1,
    submitted_at=1_800_000_000.25,
    finished_at=1_800_000_001.5,
    times=StageTimes(1.0, 2.0, 3.0, 4.0, 5.0),
    worker="worker-0",
    fingerprint="5a5a",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
)
FAILED = Outcome(
    job_id="f",
    status="failed",
    tenant="acme",
    model="minilm",
    code="image_truncated",
    message="Expected a whole JPEG.",
    attempts=3,
    submitted_at=1_800_000_000.25,
    finished_at=1_800_000_001.5,
)
BATCH = Batch(
    id="0123456789abcdef01234567",
    model="minilm",
    version=3,
    reply_to=0,
    lease_s=10.0,
    max_run_s=60.0,
    alone=True,
    items=[
        BatchItem(
            JOB.id, "acme", JOB.payload, JOB.params, JOB.submitted_at, JOB.deadline_at, "4bf9"
        ),
        BatchItem("f", "acme", RETRIED.payload, {}, 1.5, 2.5),
    ],
)
BATCH_OF_RETRIES = msgspec.structs.replace(
    BATCH, items=[msgspec.structs.replace(item, attempt=2) for item in BATCH.items]
)
ASSIGNMENT = Assignment(BATCH.id, "worker-0", 3, [JOB.id, "f"], [0, 2])
COMPLETION = Completion(
    BATCH.id,
    "worker-0",
    [
        ItemOutcome(b'{"type":"embedding"}', times=StageTimes(1.0, 2.0, 3.0, 4.0, 5.0)),
        ItemOutcome(ref=LARGE),
        ItemOutcome(code="storage_full", message="No room.", retry=True),
    ],
)


def golden_record(name: str) -> tuple[dict[str, str], bytes]:
    record = json.loads((GOLDEN / f"{name}.json").read_bytes())
    return record["headers"], bytes.fromhex(record["value_hex"])


def golden_bytes(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


def without_times(job: Job) -> Job:
    return msgspec.structs.replace(job, submitted_at=0.0, deadline_at=0.0, not_before=0.0)


# ── read ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_of_version_1_is_read() -> None:
    headers, value = golden_record("job.v1")

    assert read_job("jobs.text.premium", headers, value, 0.0) == JOB


@pytest.mark.parametrize(("name", "job"), [("retry.v1", RETRIED), ("waiting.v1", WAITING)])
def test_a_retried_job_of_version_1_is_read(name: str, job: Job) -> None:
    headers, value = golden_record(name)

    assert read_job(RETRY, headers, value, 0.0) == job


@pytest.mark.parametrize("mode", ["", ".structured"])
def test_a_redriven_job_of_version_1_is_read_in_either_mode(mode: str) -> None:
    headers, value = golden_record(f"redriven{mode}.v1")

    assert read_job(RETRY, headers, value, 0.0) == REDRIVEN


def test_the_proof_of_version_1_is_accepted() -> None:
    headers, value = golden_record("redriven.v1")

    check_proof(read_job(RETRY, headers, value, 0.0), {"acme": [TENANT_KEY]})


def test_a_structured_job_of_version_1_is_read() -> None:
    headers, value = golden_record("job.structured.v1")

    assert read_job("jobs.text.premium", headers, value, 0.0) == JOB


def test_a_cancel_request_of_version_1_is_read() -> None:
    headers, value = golden_record("cancel.v1")

    assert read_cancel(JOB.id, headers, value) == JOB.id


@pytest.mark.parametrize(("name", "outcome"), [("result.v1", OUTCOME), ("failure.v1", FAILED)])
def test_a_result_of_version_1_is_read(name: str, outcome: Outcome) -> None:
    _, value = golden_record(name)
    read = decode_outcome(value)

    assert bytes(read.answer) == bytes(outcome.answer)
    assert msgspec.structs.replace(read, answer=outcome.answer) == outcome


def test_a_batch_of_version_1_is_read() -> None:
    assert decode_batch(golden_bytes("batch.v1")) == BATCH


def test_a_batch_of_version_1_with_attempts_is_read() -> None:
    assert decode_batch(golden_bytes("batch.attempts.v1")) == BATCH_OF_RETRIES


def test_an_assignment_of_version_1_is_read() -> None:
    assert decode_assignment(golden_bytes("assignment.v1")) == ASSIGNMENT


def test_a_completion_of_version_1_is_read() -> None:
    assert decode_completion(golden_bytes("completion.v1")) == COMPLETION


# ── write ────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_written_so_that_version_1_reads_it() -> None:
    headers, value = golden_record("job.v1")

    assert headers.items() <= job_headers(JOB).items()
    assert job_value(JOB) == value


@pytest.mark.parametrize(("name", "job"), [("retry.v1", RETRIED), ("waiting.v1", WAITING)])
def test_a_retried_job_is_written_so_that_version_1_reads_it(name: str, job: Job) -> None:
    headers, value = golden_record(name)

    assert headers.items() <= retry_headers(job).items()
    assert job_value(job) == value


def test_a_redriven_job_is_written_so_that_version_1_reads_it() -> None:
    headers, value = golden_record("redriven.v1")

    assert headers.items() <= retry_headers(REDRIVEN).items()
    assert job_value(REDRIVEN) == value


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("job", (job_headers(JOB), job_value(JOB))),
        ("redriven", (retry_headers(REDRIVEN), job_value(REDRIVEN))),
    ],
)
def test_a_structured_job_is_written_so_that_version_1_reads_it(
    name: str, record: tuple[dict[str, str], bytes]
) -> None:
    headers, value = golden_record(f"{name}.structured.v1")
    written_headers, written_value = structured_mode(*record)

    assert headers.items() <= written_headers.items()
    assert json.loads(value).items() <= json.loads(written_value).items()


def test_a_cancel_request_is_written_with_what_version_1_reads() -> None:
    headers, _ = golden_record("cancel.v1")
    written = cancel_headers("acme", JOB.id)

    assert headers.keys() <= written.keys()
    for name in ("ce_specversion", "ce_type", "ce_source", "ce_subject"):
        assert written[name] == headers[name]


@pytest.mark.parametrize(("name", "outcome"), [("result.v1", OUTCOME), ("failure.v1", FAILED)])
def test_a_result_is_written_so_that_version_1_reads_it(name: str, outcome: Outcome) -> None:
    headers, value = golden_record(name)
    written = json.loads(encode_outcome(outcome))

    assert headers.items() <= result_headers(outcome).items()
    assert json.loads(value).items() <= written.items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch.v1", BATCH),
        ("batch.attempts.v1", BATCH_OF_RETRIES),
        ("assignment.v1", ASSIGNMENT),
        ("completion.v1", COMPLETION),
    ],
)
def test_a_message_is_written_with_the_fields_of_version_1_in_their_places(
    name: str, message: Batch | Assignment | Completion
) -> None:
    assert_begins_with(
        msgspec.msgpack.decode(encode(message)), msgspec.msgpack.decode(golden_bytes(name))
    )


def assert_begins_with(written: Any, golden: Any) -> None:
    """Fields are places in an array: version 1's stay where they are, new ones come behind."""
    if isinstance(golden, list):
        assert isinstance(written, list)
        assert len(written) >= len(golden)
        for one, other in zip(written, golden, strict=False):
            assert_begins_with(one, other)
    else:
        assert written == golden


def test_the_task_keeps_its_wire_name() -> None:
    assert RUN_BATCH == "headrace.run_batch.v1"


# ── what a later version adds is ignored ─────────────────────────────────────────────────────────


def test_a_job_with_headers_of_a_later_version_is_read() -> None:
    headers, value = golden_record("job.v1")

    job = read_job("jobs.text.premium", headers | {"ce_added": "1"}, value, 0.0)

    assert job == msgspec.structs.replace(JOB, foreign={"ce_added": "1"})


def test_a_result_with_fields_of_a_later_version_is_read() -> None:
    _, value = golden_record("result.v1")
    later = json.dumps(json.loads(value) | {"added": {"x": [1]}}).encode()

    assert decode_outcome(later).job_id == OUTCOME.job_id


def test_a_batch_with_fields_of_a_later_version_is_read() -> None:
    later = msgspec.msgpack.decode(encode(BATCH))
    later[7] = [[*item, "added"] for item in later[7]]

    assert decode_batch(msgspec.msgpack.encode([*later, {"added": 1}])) == BATCH


def test_an_assignment_with_fields_of_a_later_version_is_read() -> None:
    later = msgspec.msgpack.decode(encode(ASSIGNMENT))

    assert decode_assignment(msgspec.msgpack.encode([*later, "added"])) == ASSIGNMENT


def test_a_completion_with_fields_of_a_later_version_is_read() -> None:
    later = msgspec.msgpack.decode(encode(COMPLETION))
    later[2] = [[*item, "added"] for item in later[2]]

    assert decode_completion(msgspec.msgpack.encode([*later, None])) == COMPLETION
