"""Waiting on a clock of the test's own: told by Redis, looking by itself, and at last into the log."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from infra.eventlog import NewRecord
from producers import waiting
from producers.waiting import AWAY_S, IDLE_EARS, LOOK_EVERY_S, SEARCH_AFTER_S, Ears, Waiter
from schemas.errors import Transient
from schemas.jobs import new_job_id
from schemas.results import Outcome, encode_outcome
from schemas.topics import RESULTS

Succeeded = Callable[..., Outcome]


@pytest.fixture
def passed(view: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that went by, as the only element. Waiting passes time, nothing else does."""
    passed = [0.0]

    def pass_s(seconds: float) -> None:
        passed[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: passed[0], time=lambda: 1e9 + passed[0], sleep=pass_s)
    monkeypatch.setattr(waiting, "time", clock)
    view.pass_s = pass_s
    return passed


@pytest.fixture
def wait(view: Any, client: Any, passed: list[float]) -> Callable[..., list[str]]:
    """`wait("a", "b", timeout_s=60)`: ids in the order they were seen to end."""

    def until_ended(*ids: str, timeout_s: float = 300) -> list[str]:
        waiter = Waiter(view, client.log, Ears(lambda: view.notices("me")))
        return [outcome.job_id for outcome in waiter.ended(ids, timeout_s)]

    return until_ended


def test_nothing_to_wait_for_is_over_at_once(wait: Any, passed: list[float]) -> None:
    assert wait() == []
    assert passed == [0]


def test_what_has_ended_is_seen_at_once(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    for id_ in "ab":
        view.end(succeeded(id_))

    assert wait("a", "b") == ["a", "b"]
    assert passed == [0]


def test_a_job_that_runs_has_not_ended(wait: Any, view: Any, succeeded: Succeeded) -> None:
    view.end(succeeded("a", status="running"))

    with pytest.raises(TimeoutError):
        wait("a", timeout_s=5)


def test_what_ends_is_seen_when_it_is_told(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    view.on["wait"] = [lambda: view.end(succeeded("b")), lambda: view.end(succeeded("a"))]

    assert wait("a", "b") == ["b", "a"]
    assert passed[0] <= 2 * LOOK_EVERY_S


def test_a_notice_of_another_job_is_passed_over(wait: Any, view: Any, succeeded: Succeeded) -> None:
    view.on["wait"] = [lambda: view.end(succeeded("x")), lambda: view.end(succeeded("a"))]

    assert wait("a") == ["a"]


def test_a_notice_told_twice_gives_one_outcome(wait: Any, view: Any, succeeded: Succeeded) -> None:
    view.on["wait"] = [
        lambda: view.end(succeeded("a")) or view.end(succeeded("a")),
        lambda: view.end(succeeded("b")),
    ]

    assert wait("a", "b") == ["a", "b"]


def test_what_was_not_told_is_seen_a_little_later(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    view.on["wait"] = [lambda: view.end(succeeded("a"), notice=False)]

    assert wait("a") == ["a"]
    assert passed[0] <= 2 * LOOK_EVERY_S


def test_a_job_that_ends_while_the_ear_is_being_opened_is_seen_at_once(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    """The first job of a program ends within milliseconds: it must not wait for the next look."""
    view.on["notices"] = [lambda: view.end(succeeded("a"))]

    assert wait("a") == ["a"]
    assert passed[0] == 0


def test_after_its_time_a_wait_gives_up_and_says_how_many_are_left(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    view.end(succeeded("b"))

    with pytest.raises(TimeoutError, match="2 jobs had not ended after 7 s"):
        wait("a", "b", "c", timeout_s=7)

    assert 7 <= passed[0] <= 7 + LOOK_EVERY_S


def test_what_the_view_does_not_show_is_found_in_the_log(
    wait: Any, client: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    job_id = new_job_id("default")
    client.log.append([NewRecord(RESULTS, job_id, {}, encode_outcome(succeeded(job_id)))])

    assert wait(job_id) == [job_id]
    assert passed[0] <= SEARCH_AFTER_S + LOOK_EVERY_S


def test_a_redis_that_comes_back_in_time_is_waited_for(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    view.away = True

    def come_back() -> None:
        if passed[0] > AWAY_S / 2:
            view.away = False
            view.end(succeeded("a"))
        view.on["notices"] = view.on["get"] = view.on["wait"] = [come_back]

    come_back()
    view.away = True

    assert wait("a") == ["a"]


def test_a_redis_that_stays_away_is_told(wait: Any, view: Any, passed: list[float]) -> None:
    view.away = True

    with pytest.raises(Transient, match="away"):
        wait("a", timeout_s=1000)

    assert AWAY_S <= passed[0] <= AWAY_S + 2 * LOOK_EVERY_S


def test_a_redis_that_goes_away_now_and_then_does_not_add_up(
    wait: Any, view: Any, succeeded: Succeeded, passed: list[float]
) -> None:
    def flicker() -> None:
        view.away = int(passed[0] / 20) % 2 == 1
        if passed[0] > 5 * AWAY_S:
            view.away = False
            view.end(succeeded("a"))
        view.on["get"] = view.on["wait"] = view.on["notices"] = [flicker]

    flicker()

    assert wait("a", timeout_s=1000) == ["a"]


def test_many_jobs_are_looked_at_in_groups(wait: Any, view: Any, succeeded: Succeeded) -> None:
    ids = [f"job-{i}" for i in range(2500)]
    for id_ in ids:
        view.end(succeeded(id_))

    assert wait(*ids) == ids
    assert view.calls.count("get") == 3


# ── ears ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ears(view: Any) -> Ears:
    return Ears(lambda: view.notices("me"))


def test_an_ear_is_used_by_one_wait_at_a_time_and_then_by_the_next(ears: Ears) -> None:
    one, other = ears.take(), ears.take()
    assert one is not other

    ears.give_back(one)

    assert ears.take() is one


def test_only_a_few_idle_ears_are_kept(ears: Ears, view: Any) -> None:
    for ear in [ears.take() for _ in range(IDLE_EARS + 3)]:
        ears.give_back(ear)

    assert sum(not ear.closed for ear in view.ears) == IDLE_EARS
    ears.close()
    assert all(ear.closed for ear in view.ears)


@pytest.mark.parametrize("ends", ["well", "late", "abandoned"])
def test_however_a_wait_ends_its_ear_is_free_again(
    ears: Ears, view: Any, client: Any, succeeded: Succeeded, passed: list[float], ends: str
) -> None:
    view.end(succeeded("a"))
    waiting_for = ["a"] if ends == "well" else ["a", "b"]
    outcomes = Waiter(view, client.log, ears).ended(waiting_for, 5)
    assert next(outcomes).job_id == "a"

    if ends == "abandoned":
        outcomes.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(StopIteration if ends == "well" else TimeoutError):
            next(outcomes)

    assert ears.take() is view.ears[0]
    assert len(view.ears) == 1


def test_an_ear_that_is_given_back_to_a_closed_client_is_closed(ears: Ears, view: Any) -> None:
    """A wait in another thread may end after the client was closed."""
    ear = ears.take()
    ears.close()

    ears.give_back(ear)

    assert view.ears[0].closed
