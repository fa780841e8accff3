"""Jobs that wait for what their model lacks: turns while it lacks it, and release once it answers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.dispatcher.waiting import (
    FORGET_S,
    RELEASE_FIRST,
    RELEASE_MOST,
    TURNS_PER_S,
    WAIT_MIN_S,
    WAIT_MOST_S,
    Waiting,
)


@given(st.integers(-1_000_000, 1_000_000), st.integers())
def test_a_job_is_tried_again_after_a_tenth_of_its_wait_but_never_at_once(
    waited_s: int, seed: int
) -> None:
    most_s = min(WAIT_MOST_S, max(WAIT_MIN_S, waited_s / 10))

    again_s = Waiting(random.Random(seed)).missed("m/1", -waited_s, 0)

    assert most_s / 2 <= again_s <= most_s


def test_many_jobs_take_turns() -> None:
    """Three thousand would be two thousand records a second."""
    waiting, now = Waiting(), 1000.0

    for _ in range(3):
        again_at = sorted(waiting.missed("m/1", now, now) for _ in range(3000))
        assert again_at[-1] - now == pytest.approx(3000 / TURNS_PER_S, rel=0.01)
        in_a_second = [sum(now + s <= at < now + s + 1 for at in again_at) for s in range(3, 10)]
        assert max(in_a_second) <= TURNS_PER_S + 1
        now = again_at[-1]

    assert waiting.missed("m/1", now, now) <= now + WAIT_MIN_S, "a crowd that is gone is forgotten"


def test_a_crowd_of_one_model_is_none_of_anothers_business() -> None:
    waiting = Waiting()
    for _ in range(10_000):
        waiting.missed("m/1", 0, 0)

    assert waiting.missed("m/2", 0, 0) <= WAIT_MIN_S


def test_a_clock_that_was_put_back_has_no_job_wait_for_what_it_lost() -> None:
    waiting = Waiting()
    waiting.missed("m/1", 10_000, 10_000)

    assert waiting.missed("m/1", 0, 0) <= WAIT_MOST_S


def test_when_a_model_answers_its_jobs_go_few_at_first_and_ever_more() -> None:
    waiting = Waiting()
    waiting.missed("m/1", 0, 0)
    assert waiting.release(0) == {}

    released = []
    for second in range(30):
        waiting.answered("m/1")
        released.append(waiting.release(second)["m/1"])

    assert released[:3] == [RELEASE_FIRST, 2 * RELEASE_FIRST, 4 * RELEASE_FIRST]
    assert released[-1] == RELEASE_MOST


def test_what_is_found_lacking_meanwhile_begins_it_anew() -> None:
    waiting = Waiting()
    waiting.missed("m/1", 0, 0)
    waiting.release(0)
    for _ in range(3):
        waiting.answered("m/1")
        waiting.release(0)

    waiting.answered("m/1")
    waiting.missed("m/1", 0, 0)
    assert waiting.release(0) == {}
    waiting.answered("m/1")
    assert waiting.release(0) == {"m/1": RELEASE_FIRST}


def test_what_was_refused_in_another_life_is_released_too() -> None:
    waiting = Waiting()
    waiting.waits("m/1", 0)
    assert waiting.release(0) == {}

    waiting.answered("m/1")

    assert waiting.release(0) == {"m/1": RELEASE_FIRST}


def test_a_model_that_does_not_answer_releases_nobody() -> None:
    waiting = Waiting()
    waiting.missed("m/1", 0, 0)

    assert [waiting.release(second) for second in range(3)] == [{}, {}, {}]


def test_a_model_that_lacks_nothing_is_not_remembered() -> None:
    waiting = Waiting()
    waiting.answered("well/1")
    waiting.missed("m/1", 0, 0)
    waiting.release(0)
    assert list(waiting._models) == ["m/1"]

    waiting.release(FORGET_S + 1)

    assert waiting._models == {}
