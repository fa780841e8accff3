"""When a segment ends, how it is cut and named, and which records are outcomes."""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.eventlog import Position
from infra.lake_rows import outcomes_of, parquet, read_parquet, table_of
from schemas.payloads import Ref
from schemas.results import Outcome, StageTimes, decode_outcome, encode_outcome
from workers.archiver.segments import Entry, Limits, Segment, Unreadable, read_outcome


def segment_of(*offsets: int) -> Segment:
    return Segment([Entry(Position("results", 2, n), b"%d" % n) for n in offsets], 0.0)


def test_it_is_due_by_its_span_because_gaps_take_room_in_the_window() -> None:
    limits = Limits(records=100, size_bytes=10**9, age_s=60)
    assert not segment_of(5, 103).is_due(limits, now=0)
    assert segment_of(5, 104).is_due(limits, now=0)
    assert segment_of(5).is_due(limits, now=60)


def test_once_claimed_it_is_due_when_its_end_has_come() -> None:
    limits = Limits(records=1, size_bytes=1, age_s=1)
    segment = segment_of(1, 2)
    segment.until = 4
    assert not segment.is_due(limits, now=100)
    segment.add(Entry(Position("results", 2, 5), b"5"))  # 4 was the end of a transaction
    assert segment.is_due(limits, now=100)


def test_what_comes_after_the_end_is_a_segment_of_its_own() -> None:
    whole, rest = segment_of(3, 5, 8, 9).cut(until=7)
    assert rest is not None
    assert [p.offset for p in whole.positions] == [3, 5]
    assert [p.offset for p in rest.positions] == [8, 9]
    assert whole.size_bytes + rest.size_bytes == segment_of(3, 5, 8, 9).size_bytes
    assert segment_of(3, 5).cut(until=5)[1] is None


def test_the_claim_does_not_depend_on_how_much_has_come() -> None:
    short, long = segment_of(3, 5), segment_of(3, 5, 8)
    assert short.claim == long.claim
    assert short.name != long.name
    assert long.cut(until=5)[0].name == short.name


texts = st.text(max_size=30)
times = st.floats(0, 253_000_000_000, allow_nan=False)
outcomes = st.builds(
    Outcome,
    job_id=st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True),
    status=st.sampled_from(["succeeded", "failed", "expired", "cancelled"]),
    tenant=st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?", fullmatch=True),
    model=texts,
    version=st.none() | st.integers(-(2**63), 2**63 - 1),
    answer=st.recursive(st.none() | texts, lambda inner: st.lists(inner, max_size=3)).map(
        lambda value: msgspec.Raw(msgspec.json.encode(value))
    ),
    ref=st.none() | st.builds(Ref, texts.filter(bool), st.integers(0, 2**63 - 1), texts),
    code=st.none() | texts,
    message=st.none() | texts,
    attempts=st.integers(0, 2**31),
    submitted_at=times,
    finished_at=st.none() | times,
    times=st.none() | st.builds(StageTimes, *[st.floats(0, 1e9)] * 5),
    worker=st.none() | texts,
    fingerprint=st.none() | texts,
    trace_id=st.none() | texts,
)


@given(outcomes)
def test_every_outcome_comes_back_from_its_row(outcome: Outcome) -> None:
    assert read_outcome(encode_outcome(outcome)) == outcome
    (found,) = outcomes_of(read_parquet(parquet(table_of([outcome])), "key"), outcome.job_id)
    assert found.submitted_at == pytest.approx(outcome.submitted_at, abs=1e-6, rel=0)
    assert found.finished_at == (
        None if outcome.finished_at is None else pytest.approx(outcome.finished_at, abs=1e-6, rel=0)
    )
    same = msgspec.structs.replace(
        found, submitted_at=outcome.submitted_at, finished_at=outcome.finished_at
    )
    assert same == outcome


def test_rows_of_older_and_newer_versions_are_read() -> None:
    outcome = Outcome(job_id="a", status="succeeded", tenant="t", model="m", times=StageTimes(1.0))
    table = table_of([outcome])
    older = table.drop_columns(["trace_id", "store_ms", "ref_key"])
    newer = table.append_column("price", pa.array([1.5])).append_column("tag", pa.array(["x"]))
    for changed in (older, newer):
        (found,) = outcomes_of(read_parquet(parquet(changed), "key"), "a")
        assert (found.job_id, found.ref, found.trace_id) == ("a", None, None)
        assert found.times
        assert found.times.waited_ms == 1.0


@given(st.binary(max_size=200))
def test_bytes_that_are_no_outcome_are_unreadable_and_nothing_else(value: bytes) -> None:
    with pytest.raises(Unreadable):
        read_outcome(value)


@given(outcomes, st.data())
def test_whatever_is_read_can_be_a_row(outcome: Outcome, data: st.DataObject) -> None:
    """One byte changed in a good record."""
    value = bytearray(encode_outcome(outcome))
    value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = read_outcome(bytes(value))
    except Unreadable:
        return
    assert outcomes_of(read_parquet(parquet(table_of([read])), "key"), read.job_id)


def test_an_answer_that_is_no_text_is_unreadable() -> None:
    value = b'{"job_id":"a","status":"failed","tenant":"t","model":"m","answer":"\xff"}'
    assert decode_outcome(value)  # an answer is not looked into there
    with pytest.raises(Unreadable):
        read_outcome(value)
