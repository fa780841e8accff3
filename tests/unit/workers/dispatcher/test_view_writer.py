"""The view keeps up with the results topic, and comes back whatever Redis forgot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from infra.eventlog import NewRecord
from infra.job_view import Ended
from schemas.jobs import Job
from schemas.results import encode_outcome, outcome_of
from schemas.topics import RESULTS
from workers.dispatcher.view_writer import REBUILD_CHUNK, ViewTtl, ViewWriter

TTL_S = 3600


@pytest.fixture
def writer(view: Any, log: Any) -> ViewWriter:
    return ViewWriter(view, log, ViewTtl(TTL_S, 1_000_000))


@pytest.fixture
def end(log: Any, clock: Any, make_job: Callable[..., Job]) -> Callable[[str], Ended]:
    """`end("a")`: the job's outcome in the log, and what the view is to be told of it."""

    def ended(job_id: str) -> Ended:
        outcome = outcome_of(make_job(id=job_id), "succeeded", finished_at=clock.wall())
        value = encode_outcome(outcome)
        log.append([NewRecord(RESULTS, job_id, {}, value)])
        return Ended(job_id, value, None)

    return ended


def rebuild(writer: ViewWriter, now: float, most_steps: int = 20) -> None:
    for _ in range(most_steps):
        if not writer.behind:
            return
        writer.catch_up(now)
    raise AssertionError("the view does not catch up")


def test_a_new_writer_reads_what_an_earlier_life_wrote_and_did_not_show(
    writer: ViewWriter, view: Any, clock: Any, end: Any
) -> None:
    end("a")
    clock.advance(10)
    assert writer.behind

    rebuild(writer, clock.wall())

    assert view.statuses() == {"a": "succeeded"}


def test_after_a_sign_off_only_what_came_since_is_read_again(
    writer: ViewWriter, view: Any, log: Any, clock: Any, end: Any
) -> None:
    rebuild(writer, clock.wall())
    old = end("old")
    writer.show([old], clock.wall())
    clock.advance(600)
    writer.show([], clock.wall())
    writer.sign_off()
    view.values.clear()
    clock.advance(10)
    end("new")

    successor = ViewWriter(view, log, ViewTtl(TTL_S, 1_000_000))
    rebuild(successor, clock.wall())

    assert view.statuses() == {"new": "succeeded"}
    assert successor.losses == 0


def test_only_what_the_view_may_not_have_is_read_again(
    writer: ViewWriter, view: Any, clock: Any, end: Any
) -> None:
    end("old")
    clock.advance(100)
    view.mark_of[0] = clock.wall()
    end("new")

    rebuild(writer, clock.wall())

    assert view.statuses() == {"new": "succeeded"}


def test_outcomes_older_than_the_view_keeps_them_are_not_read_again(
    writer: ViewWriter, view: Any, clock: Any, end: Any
) -> None:
    end("old")
    clock.advance(TTL_S + 1)
    end("new")

    rebuild(writer, clock.wall())

    assert view.statuses() == {"new": "succeeded"}


def test_after_it_lost_its_memory_the_view_is_rebuilt(
    writer: ViewWriter, view: Any, clock: Any, end: Any
) -> None:
    rebuild(writer, clock.wall())
    writer.show([end("a")], clock.wall())
    view.forget()
    clock.advance(10)

    writer.show([end("b")], clock.wall())
    assert writer.behind
    rebuild(writer, clock.wall())

    assert view.statuses() == {"a": "succeeded", "b": "succeeded"}


def test_a_rebuild_goes_in_steps_and_what_ends_meanwhile_is_shown_at_once(
    writer: ViewWriter, view: Any, clock: Any, end: Any
) -> None:
    for number in range(2 * REBUILD_CHUNK + 1):
        end(str(number))
    clock.advance(10)

    writer.catch_up(clock.wall())
    assert len(view.values) == REBUILD_CHUNK
    writer.show([end("now")], clock.wall())
    assert "now" in view.values
    rebuild(writer, clock.wall())

    assert len(view.values) == 2 * REBUILD_CHUNK + 2


@pytest.mark.parametrize("after_steps", [1, 2, 3])
def test_a_loss_during_a_rebuild_begins_it_anew(
    writer: ViewWriter, view: Any, clock: Any, end: Any, after_steps: int
) -> None:
    for number in range(2 * REBUILD_CHUNK + 1):
        end(str(number))
    clock.advance(10)
    for _ in range(after_steps):
        writer.catch_up(clock.wall())
    view.forget()

    writer.show([end("last")], clock.wall())
    rebuild(writer, clock.wall())

    assert len(view.values) == 2 * REBUILD_CHUNK + 2


def test_a_loss_between_reading_the_mark_and_setting_it_is_noticed(
    writer: ViewWriter, view: Any, clock: Any, end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end("a")
    clock.advance(100)
    view.mark_of[0] = clock.wall()
    read = view.marks

    def lost_right_after() -> dict[int, float]:
        marks: dict[int, float] = read()
        view.forget()
        monkeypatch.undo()
        return marks

    monkeypatch.setattr(view, "marks", lost_right_after)
    rebuild(writer, clock.wall())

    assert view.statuses() == {"a": "succeeded"}


@pytest.mark.parametrize("call", ["view.ended", "view.show", "view.marks", "log.read"])
@pytest.mark.parametrize("answer_lost", [False, True])
def test_whatever_fails_the_view_has_it_all_in_the_end(
    writer: ViewWriter,
    view: Any,
    clock: Any,
    faults: Any,
    end: Any,
    call: str,
    answer_lost: bool,
) -> None:
    if answer_lost:
        faults.lose_answer(call)
    else:
        faults.fail(call)

    for id_ in "abc":
        writer.show([end(id_)], clock.wall())
        clock.advance(10)
        writer.catch_up(clock.wall())
    rebuild(writer, clock.wall())

    assert view.statuses() == dict.fromkeys("abc", "succeeded")


def test_while_redis_is_away_nothing_is_raised_and_afterwards_all_is_there(
    writer: ViewWriter, view: Any, clock: Any, faults: Any, end: Any
) -> None:
    rebuild(writer, clock.wall())
    faults.always.add("view")
    for id_ in "abc":
        writer.show([end(id_)], clock.wall())
        writer.catch_up(clock.wall())
        clock.advance(100)
    faults.always.clear()

    rebuild(writer, clock.wall())

    assert view.statuses() == dict.fromkeys("abc", "succeeded")


def test_a_view_that_has_everything_is_left_alone(
    writer: ViewWriter, view: Any, clock: Any, end: Any
) -> None:
    rebuild(writer, clock.wall())
    end("unshown")

    writer.catch_up(clock.wall())

    assert view.values == {}


# ── how long ─────────────────────────────────────────────────────────────────────────────────────


def test_few_jobs_are_shown_for_as_long_as_is_allowed(noon: float) -> None:
    ttl = ViewTtl(longest_s=3600, most_jobs=10_000)
    for second in range(100):
        ttl.count(second % 2, noon + second)
        assert ttl.seconds == 3600


@pytest.mark.parametrize(("per_second", "shown_s"), [(1, 1000), (10, 100), (1000, 60)])
def test_the_more_jobs_end_the_shorter_they_are_shown(
    noon: float, per_second: int, shown_s: int
) -> None:
    ttl = ViewTtl(longest_s=3600, most_jobs=1000)
    for second in range(60):
        ttl.count(per_second, noon + second)

    assert ttl.seconds == pytest.approx(shown_s, rel=0.15)


def test_after_a_rush_they_are_shown_longer_again(noon: float) -> None:
    ttl = ViewTtl(longest_s=3600, most_jobs=1000)
    for second in range(60):
        ttl.count(100 if second < 30 else 0, noon + second)

    assert ttl.seconds == 3600


def test_a_clock_that_is_set_back_stops_no_job_from_being_shown(noon: float) -> None:
    ttl = ViewTtl(longest_s=3600, most_jobs=1000)
    for now in (noon, noon + 60, noon - 600, noon - 590, noon - 580):
        ttl.count(1, now)
        assert 60 <= ttl.seconds <= 3600
