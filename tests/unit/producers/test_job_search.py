"""Jobs found in the log itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from infra.eventlog import NewRecord
from producers.job_search import find_ended, find_job, find_retry, recent_jobs
from schemas.jobs import Job, job_headers, job_value, new_job_id, retry_headers
from schemas.results import Outcome, encode_outcome
from schemas.topics import RESULTS, RETRY

Succeeded = Callable[..., Outcome]


@pytest.fixture
def log(client: Any) -> Any:
    return client.log


@pytest.fixture
def submit(log: Any, make_job: Callable[..., Job]) -> Callable[..., str]:
    """`submit(key="k")`: appended now; gives its id."""

    def append(**facts: Any) -> str:
        facts.setdefault("id", new_job_id("default", facts.get("key")))
        facts.setdefault("submitted_at", time.time())
        job = make_job(**facts)
        log.append([NewRecord(job.topic, job.id, job_headers(job), job_value(job))])
        return job.id

    return append


@pytest.fixture
def end(log: Any, succeeded: Succeeded) -> Callable[..., None]:
    def append(job_id: str, **facts: Any) -> None:
        outcome = succeeded(job_id, **({"submitted_at": time.time()} | facts))
        log.append([NewRecord(RESULTS, job_id, {}, encode_outcome(outcome))])

    return append


def anything(outcome: Outcome) -> bool:
    return True


@pytest.mark.parametrize("key", [None, "k"])
def test_a_job_that_waits_is_found_as_queued(log: Any, submit: Any, key: str | None) -> None:
    submit()
    job_id = submit(key=key)

    found = find_job(log, job_id)

    assert found is not None
    assert (found.job_id, found.status, found.model) == (job_id, "queued", "echo")


@pytest.mark.parametrize("key", [None, "k"])
def test_a_job_that_ended_is_found_with_its_outcome(
    log: Any, submit: Any, end: Any, key: str | None
) -> None:
    job_id = submit(key=key)
    end(job_id)

    found = find_job(log, job_id)

    assert found is not None
    assert (found.status, found.json()) == ("succeeded", {"type": "echo"})


def test_a_record_that_is_no_job_hides_no_retry(log: Any, make_job: Callable[..., Job]) -> None:
    job = make_job(id=new_job_id("default"), attempt=1)
    log.append([NewRecord(RETRY, job.id, retry_headers(job), job_value(job))])
    log.append([NewRecord(RETRY, job.id, {"ce_type": "garbage"}, b"")])

    found = find_retry(log, job.id)

    assert found is not None
    assert found.attempt == 1


@pytest.mark.parametrize("job_id", ["nobody", new_job_id("default"), new_job_id("default", "k")])
def test_a_job_that_is_not_in_the_log_is_not_found(log: Any, submit: Any, job_id: str) -> None:
    submit()

    assert find_job(log, job_id) is None


def test_a_record_that_is_no_job_is_not_found_as_one(log: Any) -> None:
    log.append([NewRecord("jobs.text.bulk", "a", {"ce_type": "x"}, b"")])

    assert find_job(log, "a") is None


def test_the_outcomes_of_several_jobs_are_found_in_one_pass(
    log: Any, submit: Any, end: Any
) -> None:
    ids = [submit() for _ in range(5)]
    for job_id in ids[:3]:
        end(job_id)

    found = {outcome.job_id for outcome in find_ended(log, set(ids[1:]))}

    assert found == set(ids[1:3])


# ── recent ───────────────────────────────────────────────────────────────────────────────────────


def test_the_newest_jobs_come_first_with_how_they_stand(log: Any, submit: Any, end: Any) -> None:
    now = time.time()
    ids = [submit(submitted_at=now + i) for i in range(4)]
    end(ids[1], submitted_at=now + 1)

    jobs = recent_jobs(log, 0.0, 3, anything)

    assert [job.job_id for job in jobs] == [ids[3], ids[2], ids[1]]
    assert [job.status for job in jobs] == ["queued", "queued", "succeeded"]


def test_only_wanted_jobs_count_towards_the_limit(log: Any, submit: Any) -> None:
    mine = submit(tenant="mine")
    for _ in range(5):
        submit(tenant="other")

    jobs = recent_jobs(log, 0.0, 3, lambda outcome: outcome.tenant == "mine")

    assert [job.job_id for job in jobs] == [mine]


def test_a_job_submitted_twice_under_its_key_is_one_job(log: Any, submit: Any, end: Any) -> None:
    for _ in range(3):
        job_id = submit(key="k", submitted_at=1000.0)
    end(job_id, submitted_at=1000.0)

    assert [job.job_id for job in recent_jobs(log, 0.0, 10, anything)] == [job_id]


def test_records_that_are_no_jobs_are_passed_over(log: Any, submit: Any) -> None:
    log.append([NewRecord("jobs.text.bulk", "a", {"ce_type": "x"}, b"")])
    job_id = submit()

    assert [job.job_id for job in recent_jobs(log, 0.0, 10, anything)] == [job_id]


def test_jobs_of_before_are_left_out(log: Any, submit: Any) -> None:
    submit()

    assert recent_jobs(log, time.time() + 1, 10, anything) == []
