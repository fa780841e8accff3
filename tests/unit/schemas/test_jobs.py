"""Jobs on the wire: what is written is read back, and what is wrong is refused in words."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.batches import Batch, BatchItem, decode_batch, encode
from schemas.cloudevents import structured_mode
from schemas.errors import InvalidJob
from schemas.jobs import (
    DEAD_LETTER_HEADERS,
    FOREIGN_LIMIT_BYTES,
    JOB_TYPE,
    PARAMS_LIMIT_BYTES,
    Job,
    cancel_headers,
    job_headers,
    job_value,
    new_job_id,
    new_traceparent,
    read_cancel,
    read_job,
    retry_headers,
    rfc3339,
    submitted_near,
)
from schemas.payloads import Payload, Ref
from schemas.results import outcome_of
from schemas.topics import JOB_TOPICS, RETRY

MINIMAL = {
    "ce_specversion": "1.0",
    "ce_type": JOB_TYPE,
    "ce_id": "job-1",
    "ce_tenant": "default",
    "ce_model": "echo",
}
TEXT = "jobs.text.standard"

# Times of this century, at the resolution of the wire.
times = st.integers(0, 4_000_000_000_000_000).map(lambda micros: micros / 1_000_000)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
payloads = st.builds(Payload, words, data=st.binary(max_size=64)) | st.builds(
    Payload,
    words,
    ref=st.builds(
        Ref, words, st.integers(0, 2**40), st.text("0123456789abcdef", min_size=64, max_size=64)
    ),
)
jobs = st.builds(
    Job,
    id=st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True),
    topic=st.sampled_from(JOB_TOPICS),
    tenant=st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,20}[a-z0-9])?", fullmatch=True),
    model=words,
    payload=payloads,
    submitted_at=times,
    deadline_at=times,
    version=st.none() | st.integers(0, 10**15 - 1),
    priority=st.integers(0, 9),
    params=st.dictionaries(words, json_values, max_size=3),
    reply_to=st.none() | words,
    traceparent=st.none() | st.builds(new_traceparent),
    replay=st.none() | words,
    signature=st.none() | words,
    foreign=st.dictionaries(words.map("app-{}".format), words, max_size=3),
)


def keyed(job: Job, key: str) -> Job:
    return msgspec.structs.replace(job, key=key, id=new_job_id(job.tenant, key))


def same(read: Job, written: Job) -> None:
    """Equal but for times, which the wire carries in whole microseconds."""
    for name in ("submitted_at", "deadline_at", "not_before"):
        assert getattr(read, name) == pytest.approx(getattr(written, name), rel=0, abs=1e-6)
    clocks: dict[str, Any] = {"submitted_at": 0.0, "deadline_at": 0.0, "not_before": 0.0}
    assert msgspec.structs.replace(read, **clocks) == msgspec.structs.replace(written, **clocks)


@settings(deadline=None)
@given(jobs, st.none() | words)
def test_a_job_is_read_as_it_was_written(job: Job, key: str | None) -> None:
    job = job if key is None else keyed(job, key)

    headers = job_headers(job)

    assert all(isinstance(value, str) for value in headers.values())
    same(read_job(job.topic, headers, job_value(job), 0.0), job)


@settings(deadline=None)
@given(jobs, st.integers(0, 100), st.booleans(), times, st.sampled_from([None, "engine_not_built"]))
def test_a_retry_carries_what_happened_so_far(
    job: Job, attempt: int, suspect: bool, not_before: float, waits_for: str | None
) -> None:
    job = msgspec.structs.replace(
        job, attempt=attempt, suspect=suspect, not_before=not_before, waits_for=waits_for
    )

    same(read_job(RETRY, retry_headers(job), job_value(job), 0.0), job)


@settings(deadline=None)
@given(jobs)
def test_unknown_headers_change_nothing_and_are_carried_on(job: Job) -> None:
    unknown = {"ce_later": "x", "x-y": "", "ce_source": "/orders/7"}
    headers = job_headers(job) | unknown

    read = read_job(job.topic, headers, job_value(job), 0.0)

    assert read.foreign == job.foreign | unknown
    same(msgspec.structs.replace(read, foreign=job.foreign), job)
    for written in (job_headers(read), retry_headers(read)):
        assert unknown.items() <= written.items()


@settings(deadline=None)
@given(jobs, st.dictionaries(words, words))
def test_whatever_the_headers_say_it_is_a_job_or_an_invalid_job(
    job: Job, noise: dict[str, str]
) -> None:
    headers = job_headers(job)
    spoilt = headers | dict(zip(headers, noise.values(), strict=False))
    with suppress(InvalidJob):
        retry_headers(read_job(job.topic, spoilt, b"", 0.0))


def test_a_record_with_the_least_headers_is_a_job_from_when_it_was_appended() -> None:
    job = read_job(TEXT, MINIMAL, b"hi", 1000.0)

    assert (job.submitted_at, job.deadline_at) == (1000.0, 1000.0 + 24 * 3600)
    assert job.payload == Payload("application/octet-stream", data=b"hi")
    assert (job.version, job.key, job.priority, job.params) == (None, None, 0, {})


@pytest.mark.parametrize("missing", MINIMAL)
def test_a_missing_header_is_named(missing: str) -> None:
    headers = {name: value for name, value in MINIMAL.items() if name != missing}

    with pytest.raises(InvalidJob, match=f"{missing}: expected .* came nothing") as caught:
        read_job(TEXT, headers, b"", 0.0)

    assert caught.value.code == "record_malformed"


REF = {"ce_dataref": "tenants/default/x", "ce_datasize": "1", "ce_datasha256": "a" * 64}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce_specversion", ""),
        ("ce_specversion", "0.3"),
        ("ce_specversion", "2.0"),
        ("ce_type", "io.headrace.job.v2"),
        ("x-replay-id", ""),
        ("x-replay-id", "r" * 257),
        ("x-headrace-signature", ""),
        ("ce_id", "a b"),
        ("ce_id", "x" * 129),
        ("ce_id", "job\n"),
        ("ce_tenant", "Default"),
        ("ce_tenant", "a/../b"),
        ("ce_tenant", "-a"),
        ("ce_tenant", "default\n"),
        ("ce_model", ""),
        ("ce_modelversion", "one"),
        ("ce_modelversion", "-1"),
        ("ce_modelversion", "\u00b2"),
        ("ce_modelversion", "9" * 5000),
        ("ce_priority", "high"),
        ("ce_time", "yesterday"),
        ("ce_deadline", "1800000000"),
        ("ce_params", "[1]"),
        ("ce_params", "{"),
        ("ce_params", '{"a": NaN}'),
        ("ce_params", "[" * 10_000),
        ("ce_params", '{"a": "' + "x" * PARAMS_LIMIT_BYTES + '"}'),
        ("ce_datasize", "many"),
        ("ce_datasha256", "abc"),
        ("ce_datasha256", "A" * 64),
        ("ce_dataref", ""),
    ],
)
def test_a_malformed_header_is_refused_with_its_name_and_what_came(name: str, value: str) -> None:
    headers = MINIMAL | (REF if name.startswith("ce_data") else {}) | {name: value}

    with pytest.raises(InvalidJob, match=f"Header {name}: expected .+ came .+") as caught:
        read_job(TEXT, headers, b"", 0.0)

    assert caught.value.code == "record_malformed"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["ce_attempt", "ce_notbefore", "ce_jobtopic"])
def test_a_malformed_header_of_a_retry_is_refused(name: str) -> None:
    headers = MINIMAL | {"ce_jobtopic": TEXT} | {name: "results"}

    with pytest.raises(InvalidJob, match=f"Header {name}"):
        read_job(RETRY, headers, b"", 0.0)


def test_a_retry_without_its_topic_is_refused() -> None:
    with pytest.raises(InvalidJob, match="ce_jobtopic: expected a jobs topic"):
        read_job(RETRY, MINIMAL, b"", 0.0)


@pytest.mark.parametrize(
    "forged",
    [
        {"ce_jobtopic": "jobs.text.premium"},
        {"ce_attempt": "99"},
        {"ce_suspect": "1"},
        {"ce_notbefore": "2999-01-01T00:00:00Z"},
        {"ce_waitsfor": "engine_not_built"},
    ],
)
def test_only_a_retry_is_believed_what_only_the_dispatcher_can_know(
    forged: dict[str, str],
) -> None:
    """A producer that writes to its own lane must not get out of it, nor hold a window's place for years."""
    assert read_job(TEXT, MINIMAL | forged, b"", 0.0) == read_job(TEXT, MINIMAL, b"", 0.0)


@pytest.mark.parametrize(
    ("given", "read"),
    [("0", 0), ("9", 9), ("10", 9), ("123456", 9)],
)
def test_a_priority_beyond_the_range_counts_as_the_highest(given: str, read: int) -> None:
    assert read_job(TEXT, MINIMAL | {"ce_priority": given}, b"", 0.0).priority == read


@pytest.mark.parametrize(
    "spelling",
    [
        "2027-01-15T08:00:00+00:00",
        "2027-01-15T08:00:00Z",
        "2027-01-15T08:00:00.000000Z",
        "2027-01-15T10:00:00+02:00",
        "2027-01-15T08:00:00",
    ],
)
def test_times_may_be_spelled_in_any_zone_and_without_one_are_utc(spelling: str) -> None:
    job = read_job(TEXT, MINIMAL | {"ce_deadline": spelling}, b"", 0.0)

    assert job.deadline_at == datetime(2027, 1, 15, 8, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("name", ["ce_time", "ce_deadline"])
@pytest.mark.parametrize(
    "far", ["9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"]
)
def test_a_time_that_could_not_be_written_again_is_refused(name: str, far: str) -> None:
    """`DateTime.MaxValue` and the like would end the dispatcher when it writes a dead letter."""
    with pytest.raises(InvalidJob, match=f"Header {name}: expected a time"):
        read_job(TEXT, MINIMAL | {name: far}, b"", 0.0)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
def test_params_that_could_not_be_sent_to_a_worker_are_refused(number: int) -> None:
    with pytest.raises(InvalidJob, match=r"Header ce_params: expected .* 64 bits"):
        read_job(TEXT, MINIMAL | {"ce_params": json.dumps({"seed": number})}, b"", 0.0)


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63), 0, 1.5, 1e308, True])
def test_numbers_that_a_worker_can_be_sent_are_read(number: float) -> None:
    job = read_job(TEXT, MINIMAL | {"ce_params": json.dumps({"seed": number})}, b"", 0.0)

    assert decode_batch(encode(_batch_of(job))).items[0].params == {"seed": number}


def test_params_nested_as_deep_as_they_are_read_can_be_sent_to_a_worker() -> None:
    """The sender and the worker stand deeper in their stacks than the reader did."""
    carried = 0
    for depth in (10, 20, 30, 100, 300, 500, 800, 900, 950, 990):
        text = '{"a":' + "[" * depth + "]" * depth + "}"
        with suppress(InvalidJob):
            job = read_job(TEXT, MINIMAL | {"ce_params": text}, b"", 0.0)
            _deeper(60, partial(_send_and_receive, job))
            carried += 1

    assert carried >= 3


def _deeper(frames: int, call: Callable[[], object]) -> object:
    return call() if not frames else _deeper(frames - 1, call)


def _send_and_receive(job: Job) -> Batch:
    return decode_batch(encode(_batch_of(job)))


def _batch_of(job: Job) -> Batch:
    item = BatchItem(job.id, job.tenant, job.payload, job.params, 0.0, 0.0)
    return Batch("b", "echo", 1, 0, 10.0, 60.0, False, [item])


@pytest.mark.parametrize("traceparent", ["", "x", "00", "garbage without dashes", "-"])
def test_a_bad_traceparent_costs_the_trace_not_the_job(traceparent: str) -> None:
    job = read_job(TEXT, MINIMAL | {"ce_traceparent": traceparent}, b"", 0.0)

    assert not outcome_of(job, "queued").trace_id


def test_a_traceparent_has_the_trace_id_in_it(make_job: Callable[..., Job]) -> None:
    traceparent = new_traceparent()

    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", traceparent)
    assert make_job(traceparent=traceparent).trace_id == traceparent[3:35]


def test_the_id_of_a_job_with_a_key_comes_of_the_key_whatever_the_record_says() -> None:
    job = read_job(TEXT, MINIMAL | {"ce_idempotencykey": "order-7"}, b"", 0.0)

    assert job.id == new_job_id("default", "order-7")


def test_a_job_of_another_version_is_refused_with_both_versions_named() -> None:
    with pytest.raises(InvalidJob, match=r"expected io\.headrace\.job\.v1, came 'io\S+job\.v9'"):
        read_job(TEXT, MINIMAL | {"ce_type": "io.headrace.job.v9"}, b"", 0.0)


# ── headers of others ────────────────────────────────────────────────────────────────────────────


def test_names_of_attributes_may_be_spelled_in_capitals() -> None:
    """Kafka tells them apart; the specification has them in lower case, and that spelling wins."""
    headers = {name.upper(): text for name, text in MINIMAL.items()} | {"ce_id": "job-2"}

    job = read_job(TEXT, headers | {"Content-Type": "text/plain"}, b"hi", 1000.0)

    assert (job.id, job.foreign) == ("job-2", {})
    assert job.payload == Payload("text/plain", data=b"hi")


def test_names_of_foreign_headers_stay_as_they_are() -> None:
    assert read_job(TEXT, MINIMAL | {"My-App": "1"}, b"", 0.0).foreign == {"My-App": "1"}


@pytest.mark.parametrize("topic", [TEXT, RETRY])
def test_a_redrive_is_believed_wherever_a_job_comes_from(topic: str) -> None:
    headers = MINIMAL | {"ce_jobtopic": TEXT, "x-replay-id": "r-1"}

    job = read_job(topic, headers, b"", 0.0)

    assert (job.replay, job.foreign) == ("r-1", {})
    assert job_headers(job)["x-replay-id"] == retry_headers(job)["x-replay-id"] == "r-1"


def test_what_a_dead_letter_says_of_itself_does_not_stay_with_the_job() -> None:
    letter = MINIMAL | dict.fromkeys(DEAD_LETTER_HEADERS, "1")

    assert read_job(TEXT, letter, b"", 0.0) == read_job(TEXT, MINIMAL, b"", 0.0)


def test_more_foreign_headers_than_a_retry_should_carry_are_refused() -> None:
    fits = {"app": "\u00e9" * (FOREIGN_LIMIT_BYTES // 2 - 2) + "x"}

    assert read_job(TEXT, MINIMAL | fits, b"", 0.0).foreign == fits
    with pytest.raises(
        InvalidJob, match=f"at most {FOREIGN_LIMIT_BYTES} bytes .* came 81"
    ) as caught:
        read_job(TEXT, MINIMAL | fits | {"b": ""}, b"", 0.0)
    assert caught.value.code == "record_malformed"


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_id_is_a_uuid7_of_its_time() -> None:
    before = datetime.now(UTC).timestamp()
    job_id = new_job_id("default")
    after = datetime.now(UTC).timestamp()

    parsed = uuid.UUID(job_id)
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    made_at = submitted_near(job_id)
    assert made_at is not None
    assert before - 0.001 <= made_at <= after


def test_new_ids_differ() -> None:
    assert len({new_job_id("default") for _ in range(1000)}) == 1000


@given(words, words)
def test_a_key_makes_the_same_uuid8_each_time_and_another_for_another_key(a: str, b: str) -> None:
    first = uuid.UUID(new_job_id("default", a))

    assert (first.version, first.variant) == (8, uuid.RFC_4122)
    assert str(first) == new_job_id("default", a)
    assert (new_job_id("default", b) == str(first)) == (a == b)


def test_tenants_do_not_share_keys() -> None:
    assert new_job_id("a", "k") != new_job_id("b", "k")


@pytest.mark.parametrize("job_id", [str(uuid.UUID(int=0)), "job-1", new_job_id("default", "k"), ""])
def test_only_a_uuid7_tells_its_time(job_id: str) -> None:
    assert submitted_near(job_id) is None


# ── fingerprint ──────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=st.dictionaries(words, json_values, max_size=3))
def test_the_fingerprint_survives_the_wire(
    make_job: Callable[..., Job], params: dict[str, Any]
) -> None:
    job = keyed(make_job(params=params), "k")

    assert read_job(job.topic, job_headers(job), job_value(job), 0.0).fingerprint == job.fingerprint


def test_the_fingerprint_is_the_same_however_the_params_are_ordered(
    make_job: Callable[..., Job],
) -> None:
    one, other = make_job(params={"a": 1, "b": 2}), make_job(params={"b": 2, "a": 1})

    assert one.fingerprint == other.fingerprint


def test_the_fingerprint_is_the_same_for_the_same_bytes_inline_or_as_an_object(
    make_job: Callable[..., Job],
) -> None:
    inline = Payload("text/plain", data=b"hello")
    ref = Payload("text/plain", ref=Ref("tenants/default/x", 5, inline.sha256))

    assert make_job(payload=inline).fingerprint == make_job(payload=ref).fingerprint


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"params": {"k": 1}}, {"payload": Payload("text/plain", data=b"bye")}],
)
def test_other_work_has_another_fingerprint(
    make_job: Callable[..., Job], change: dict[str, Any]
) -> None:
    assert make_job(**change).fingerprint != make_job().fingerprint


@pytest.mark.parametrize(
    "change", [{"priority": 9}, {"deadline_at": 1.0}, {"lane": "bulk"}, {"reply_to": "x"}]
)
def test_the_same_work_asked_for_otherwise_has_the_same_fingerprint(
    make_job: Callable[..., Job], change: dict[str, Any]
) -> None:
    assert make_job(**change).fingerprint == make_job().fingerprint


def test_times_are_written_in_utc_with_microseconds() -> None:
    assert rfc3339(1_800_000_000.25) == "2027-01-15T08:00:00.250000+00:00"


# ── cancel requests ──────────────────────────────────────────────────────────────────────────────


def test_a_cancel_request_is_read_as_it_was_written() -> None:
    assert read_cancel("job-1", cancel_headers("default", "job-1"), b"") == "job-1"


def test_a_cancel_request_may_be_structured() -> None:
    headers, value = structured_mode(cancel_headers("default", "job-1"), b"")

    assert read_cancel("job-1", headers, value) == "job-1"


def test_an_event_of_another_kind_cancels_nothing() -> None:
    """`control` carries more than cancel requests."""
    headers = cancel_headers("default", "job-1") | {"ce_type": "io.headrace.retrain.v1"}

    assert read_cancel("job-1", headers, b"") is None


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        ("job-1", {"ce_type": ""}, "Header ce_type: expected a text"),
        ("job-1", {"ce_type": "io.headrace.cancel.v9"}, r"cancel\.v1, came 'io\S+cancel\.v9'"),
        ("job-1", {"ce_type": "x", "ce_specversion": "0.3"}, r"ce_specversion: expected 1\.0"),
        ("job-1", {"ce_specversion": ""}, r"ce_specversion: expected 1\.0"),
        ("", {}, "Key: expected a job id, came ''"),
        ("no job", {}, "Key: expected a job id"),
        ("job-1", {"content-type": "application/cloudevents+json"}, "Value: expected one"),
    ],
)
def test_a_control_record_that_is_no_event_is_refused(
    key: str, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidJob, match=words) as caught:
        read_cancel(key, cancel_headers("default", "job-1") | changes, b"\xff")

    assert caught.value.code == "record_malformed"
