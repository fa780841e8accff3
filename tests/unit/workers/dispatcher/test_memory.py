"""What a dispatcher remembers, and that it is bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schemas.jobs import Job
from schemas.payloads import Payload
from workers.dispatcher.memory import CANCELS_MOST, NO_KEY, JobMemory, OpenJob

MakeOpen = Callable[..., OpenJob]


@pytest.fixture
def memory() -> JobMemory:
    return JobMemory(keys_window_s=100, keys_most=3)


def test_an_open_job_is_known_by_its_fingerprint_or_as_one_without_a_key(
    memory: JobMemory, make_open: MakeOpen, noon: float
) -> None:
    keyed, plain = make_open(id="a", key="k"), make_open(id="b")
    memory.hold(keyed)
    memory.hold(plain)

    assert memory.known_as("a", noon) == keyed.job.fingerprint
    assert memory.known_as("b", noon) == NO_KEY
    assert memory.known_as("c", noon) is None


def test_an_ended_job_with_a_key_is_remembered_for_a_while(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    job = make_job(id="a", key="k")
    memory.ended(job, noon)

    assert memory.known_as("a", noon + 100) == job.fingerprint
    assert memory.known_as("a", noon + 101) is None


def test_an_ended_job_without_a_key_is_forgotten(
    memory: JobMemory, make_open: MakeOpen, noon: float
) -> None:
    job = make_open(id="a")
    memory.hold(job)
    memory.ended(job.job, noon)

    assert memory.known_as("a", noon) is None
    assert memory.open == {}


def test_so_many_keys_are_remembered_the_oldest_forgotten_first(
    memory: JobMemory, noon: float
) -> None:
    for id_ in "abc":
        memory.remember_key(id_, "f", noon)
    memory.remember_key("a", "f", noon + 1)
    memory.remember_key("d", "f", noon + 2)

    assert [memory.known_as(id_, noon + 2) for id_ in "abcd"] == ["f", None, "f", "f"]


def test_held_bytes_are_those_of_inline_payloads_in_hand(
    memory: JobMemory, make_open: MakeOpen, noon: float
) -> None:
    jobs = [make_open(id=id_, payload=Payload("", data=b"x" * 100)) for id_ in "abc"]
    for job in jobs:
        memory.hold(job)
    assert memory.held_bytes == 300

    memory.moved(jobs[0].job)
    memory.ended(jobs[1].job, noon)
    memory.ended(jobs[1].job, noon)
    memory.moved(make_open(id="unknown").job)

    assert memory.held_bytes == 100


def test_so_many_cancel_requests_are_remembered_the_oldest_forgotten_first(
    memory: JobMemory,
) -> None:
    for number in range(CANCELS_MOST + 1):
        memory.cancel(str(number))

    assert not memory.is_cancelled("0")
    assert memory.is_cancelled("1")
    assert memory.is_cancelled(str(CANCELS_MOST))


def test_a_cancel_request_is_spent_when_the_job_ended(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    memory.cancel("a")
    memory.ended(make_job(id="a"), noon)

    assert not memory.is_cancelled("a")
