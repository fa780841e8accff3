"""One transaction for what was decided: whole or not at all, and shown only once it is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.eventlog import NewRecord
from schemas.batches import ItemOutcome
from schemas.errors import InferenceFailed, InvalidJob, Transient
from schemas.jobs import Job, job_headers, read_job
from schemas.results import StageTimes, decode_outcome
from schemas.topics import KEYS, RESULTS, RETRY
from workers.dispatcher.outcomes import RetryPolicy

MakeJob = Callable[..., Job]

ANSWER = ItemOutcome(b'{"type":"echo"}', times=StageTimes(1, 2, 3, 4, 5))


@pytest.fixture
def received(world: Any, make_job: MakeJob) -> Any:
    """`received(job)`: submitted and received, so that its position is open."""

    def receive(job: Job) -> Any:
        world.submit(job)
        (record,) = world.consumer.receive(1, 10**9)
        return record.position

    return receive


def topics(records: list[NewRecord]) -> list[str]:
    return [record.topic for record in records]


def test_an_answer_is_a_result_and_its_position(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a", version=1, attempt=1, traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    at = received(job)

    world.outcomes.answer(job, at, ANSWER, "w", noon + 2)
    world.outcomes.commit(noon + 2)

    ((positions, outputs),) = world.consumer.commits
    assert positions == [at]
    assert topics(outputs) == [RESULTS]
    outcome = decode_outcome(outputs[0].value)
    assert (outcome.job_id, outcome.status, outcome.json()) == ("a", "succeeded", {"type": "echo"})
    assert (outcome.attempts, outcome.worker, outcome.version) == (2, "w", 1)
    assert (outcome.finished_at, outcome.times) == (noon + 2, ANSWER.times)
    assert outcome.trace_id == "a" * 32
    assert outputs[0].key == outputs[0].headers["ce_id"] == "a"


def test_the_key_of_an_answered_job_is_written_with_it(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a", key="k")

    world.outcomes.answer(job, received(job), ANSWER, "w", noon)
    world.outcomes.commit(noon)

    ((_, outputs),) = world.consumer.commits
    assert topics(outputs) == [RESULTS, KEYS]
    assert (outputs[1].key, outputs[1].headers) == ("a", {"fingerprint": job.fingerprint})


def test_a_failure_is_a_dead_letter_that_says_where_from_and_why_and_a_result(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a", lane="basic", attempt=2, params={"k": 5})
    at = received(job)

    world.outcomes.fail(job, at, InferenceFailed("bad_output", "It was bad."), noon)
    world.outcomes.commit(noon)

    ((_, outputs),) = world.consumer.commits
    assert topics(outputs) == [RESULTS, "jobs.text.basic.dlq"]
    result, letter = outputs
    assert letter.key == "a"
    assert letter.value == b"hello"
    assert letter.headers == job_headers(job) | {
        "x-original-topic": "jobs.text.basic",
        "x-original-partition": "0",
        "x-original-offset": "0",
        "x-attempt": "3",
        "x-error": "bad_output",
        "x-error-message": "It was bad.",
    }
    outcome = decode_outcome(result.value)
    assert (outcome.status, outcome.code, outcome.message) == (
        "failed",
        "bad_output",
        "It was bad.",
    )
    assert outcome.attempts == 3


def test_a_dead_letter_can_be_read_as_a_job_again(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a", priority=3, params={"k": 5})

    world.outcomes.fail(job, received(job), InferenceFailed("x", "x"), noon)
    world.outcomes.commit(noon)

    letter = world.log.records["jobs.text.standard.dlq"][0]
    assert read_job(job.topic, letter.headers, letter.value, noon) == job


def test_a_record_that_is_no_job_goes_to_the_dead_letters_as_it_came(world: Any) -> None:
    world.log.append([NewRecord("jobs.text.bulk", "k", {"a": "1"}, b"\xff\x00")])
    (record,) = world.consumer.receive(1, 1000)

    world.outcomes.reject(record, InvalidJob("record_malformed", "No."))
    world.outcomes.commit(0.0)

    ((positions, outputs),) = world.consumer.commits
    assert positions == [record.position]
    assert topics(outputs) == ["jobs.text.bulk.dlq"]
    assert (outputs[0].key, outputs[0].value) == ("k", b"\xff\x00")
    assert outputs[0].headers.items() >= {"a": "1", "x-error": "record_malformed"}.items()


def test_a_retry_is_written_with_what_happened_and_when_it_may_go_on(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a", version=1, lane="premium", attempt=1)
    at = received(job)

    world.outcomes.retry(job, at, noon, suspect=True)
    world.outcomes.commit(noon)

    ((positions, outputs),) = world.consumer.commits
    assert (positions, topics(outputs)) == ([at], [RETRY])
    again = read_job(RETRY, outputs[0].headers, outputs[0].value, noon)
    assert (again.topic, again.version) == ("jobs.text.premium", 1)
    assert (again.attempt, again.suspect) == (2, True)
    assert noon <= again.not_before <= noon + 1.0
    assert world.log.outcomes() == []


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_job_that_ended_unrun_has_a_result_and_no_dead_letter(
    world: Any, received: Any, make_job: MakeJob, noon: float, status: Any
) -> None:
    job = make_job(id="a", attempt=1)

    world.outcomes.end(job, received(job), status, noon)
    world.outcomes.commit(noon)

    ((_, outputs),) = world.consumer.commits
    assert topics(outputs) == [RESULTS]
    outcome = decode_outcome(outputs[0].value)
    assert (outcome.status, outcome.attempts) == (status, 1)


def test_all_that_was_gathered_is_one_transaction(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    a, b, c = (make_job(id=id_) for id_ in "abc")
    at = [received(job) for job in (a, b, c)]

    world.outcomes.answer(a, at[0], ANSWER, "w", noon)
    world.outcomes.retry(b, at[1], noon, suspect=False)
    world.outcomes.skip(at[2])
    assert world.consumer.commits == []
    world.outcomes.commit(noon)
    world.outcomes.commit(noon)

    ((positions, outputs),) = world.consumer.commits
    assert positions == at
    assert topics(outputs) == [RESULTS, RETRY]
    assert len(world.outcomes) == 0


def test_a_commit_that_fails_keeps_everything_for_the_next_which_writes_it_once(
    world: Any, received: Any, make_job: MakeJob, faults: Any, noon: float
) -> None:
    a, b = make_job(id="a", reply_to="c"), make_job(id="b", reply_to="c")
    world.outcomes.answer(a, received(a), ANSWER, "w", noon)
    faults.fail("log.complete", times=2)
    for _ in range(2):
        with pytest.raises(Transient):
            world.outcomes.commit(noon)
    assert world.view.values == world.view.told == {}

    world.outcomes.answer(b, received(b), ANSWER, "w", noon)
    world.outcomes.commit(noon)
    world.outcomes.commit(noon)

    assert len(world.consumer.commits) == 1
    assert world.log.statuses() == {"a": "succeeded", "b": "succeeded"}
    assert world.view.told == {"c": ["a", "b"]}


def test_the_view_is_told_after_the_log_has_it(
    world: Any, received: Any, make_job: MakeJob, noon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(id="a", reply_to="client")
    world.outcomes.answer(job, received(job), ANSWER, "w", noon)
    seen: list[dict[str, str]] = []
    show = world.view.ended

    def ended(*told: Any) -> Any:
        seen.append(world.log.statuses())
        return show(*told)

    monkeypatch.setattr(world.view, "ended", ended)
    world.outcomes.commit(noon)

    assert seen == [{"a": "succeeded"}]
    assert world.view.told == {"client": ["a"]}


def test_the_view_has_an_outcome_byte_for_byte_as_the_log_has_it(
    world: Any, received: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a")

    world.outcomes.answer(job, received(job), ANSWER, "w", noon)
    world.outcomes.commit(noon)

    assert world.view.values["a"] == world.log.records[RESULTS][0].value


def test_a_view_that_is_away_does_not_spoil_a_commit(
    world: Any, received: Any, make_job: MakeJob, faults: Any, noon: float
) -> None:
    job = make_job(id="a")
    faults.always.add("view")

    world.outcomes.answer(job, received(job), ANSWER, "w", noon)
    world.outcomes.commit(noon)

    assert world.log.statuses() == {"a": "succeeded"}
    assert len(world.outcomes) == 0


@given(st.integers(0, 10_000), st.floats(0.01, 10), st.floats(0.01, 100), st.integers())
def test_a_retry_waits_anywhere_between_now_and_twice_as_long_each_time_up_to_the_cap(
    failures: int, base_s: float, cap_s: float, seed: int
) -> None:
    delay_s = RetryPolicy(base_s, cap_s, random.Random(seed)).delay_s(failures)

    assert 0 <= delay_s <= min(cap_s, base_s * 2 ** min(failures, 64))


@pytest.mark.parametrize(("failures", "most_s"), [(0, 0.5), (1, 1), (2, 2), (20, 60)])
def test_the_jitter_is_full(failures: int, most_s: float) -> None:
    policy = RetryPolicy(0.5, 60, random.Random(1))
    delays_s = [policy.delay_s(failures) for _ in range(1000)]

    assert min(delays_s) < 0.05 * most_s
    assert max(delays_s) > 0.95 * most_s
    assert 0.45 * most_s < sum(delays_s) / 1000 < 0.55 * most_s
