"""What a dispatcher remembers, and that it is bounded."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
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

    assert memory.known_as(keyed.job, noon) == keyed.job.fingerprint
    assert memory.known_as(plain.job, noon) == NO_KEY
    assert memory.known_as(make_open(id="c").job, noon) is None


def test_an_ended_job_with_a_key_is_remembered_for_a_while(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    job = make_job(id="a", key="k")
    memory.ended(job, noon)

    assert memory.known_as(job, noon + 100) == job.fingerprint
    assert memory.known_as(job, noon + 101) is None


def test_an_ended_job_without_a_key_is_forgotten(
    memory: JobMemory, make_open: MakeOpen, noon: float
) -> None:
    job = make_open(id="a")
    memory.hold(job)
    memory.ended(job.job, noon)

    assert memory.known_as(job.job, noon) is None
    assert memory.open == {}


def test_so_many_keys_are_remembered_the_oldest_forgotten_first(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    for id_ in "abc":
        memory.remember(id_, "f", None, noon)
    memory.remember("a", "f", None, noon + 1)
    memory.remember("d", "f", None, noon + 2)

    known = [memory.known_as(make_job(id=id_), noon + 2) for id_ in "abcd"]
    assert known == ["f", None, "f", "f"]


def test_a_redrive_is_known_by_itself_and_the_key_stays_taken(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    job = make_job(id="a", key="k")
    again = msgspec.structs.replace(job, replay="letter-1")
    memory.ended(job, noon)
    assert memory.known_as(again, noon) is None

    memory.ended(again, noon)

    assert memory.known_as(again, noon) == job.fingerprint
    assert memory.known_as(msgspec.structs.replace(job, replay="letter-2"), noon) is None
    assert memory.known_as(job, noon) == job.fingerprint


def test_a_redrive_of_other_work_under_a_taken_key_is_no_new_job(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    job = make_job(id="a", key="k")
    memory.ended(job, noon)
    other = msgspec.structs.replace(job, model="other", replay="letter-1")

    assert memory.known_as(other, noon) == job.fingerprint


def test_what_is_lost_is_neither_open_nor_held(memory: JobMemory, make_open: MakeOpen) -> None:
    kept, lost = (make_open(id=id_, payload=Payload("", data=b"x" * 100)) for id_ in "ab")
    memory.hold(kept)
    memory.hold(lost)

    assert memory.lost({lost.at}) == [lost]
    assert (list(memory.open), memory.held_bytes) == (["a"], 100)


def test_a_job_whose_outcome_could_not_be_written_is_new_again(
    memory: JobMemory, make_job: Callable[..., Job], noon: float
) -> None:
    job = make_job(id="a", key="k")
    memory.ended(job, noon)
    memory.forget(job)

    assert memory.known_as(job, noon) is None


def test_held_bytes_are_those_of_inline_payloads_in_hand(
    memory: JobMemory, make_open: MakeOpen, noon: float
) -> None:
    jobs = [make_open(id=id_, payload=Payload("", data=b"x" * 100)) for id_ in "abc"]
    for job in jobs:
        memory.hold(job)
    assert memory.held_bytes == 300

    memory.moved(jobs[0].job, noon)
    memory.ended(jobs[1].job, noon)
    memory.ended(jobs[1].job, noon)
    memory.moved(make_open(id="unknown").job, noon)

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
