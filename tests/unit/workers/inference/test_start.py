"""The steps of a start, on a clock that only the tests move."""

from __future__ import annotations

from typing import Any

import pytest

from workers.inference.start import Steps


def test_steps_follow_one_another_without_a_gap(clock: Any) -> None:
    steps = Steps(age_s=2, monotonic=clock.monotonic)
    clock.advance(1)
    steps.ended("imports")
    clock.advance(0.5)
    steps.ended("connect")
    clock.advance(7)

    assert list(steps.seconds.items()) == [("imports", 3), ("connect", 0.5)]
    assert steps.total_s == sum(steps.seconds.values())


def test_a_models_steps_stand_in_the_start_under_its_name(clock: Any) -> None:
    start = Steps(monotonic=clock.monotonic)
    clock.advance(1)
    start.ended("imports")
    load = Steps("tiny/1", monotonic=clock.monotonic)
    clock.advance(2)
    load.ended("fetch")
    start.include(load)
    clock.advance(4)
    start.ended("listen")

    assert list(start.seconds.items()) == [("imports", 1), ("tiny/1 fetch", 2), ("listen", 4)]
    assert start.total_s == pytest.approx(7)
