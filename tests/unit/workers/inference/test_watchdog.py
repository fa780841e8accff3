"""A batch that overruns ends its process; one that waits or is done does not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.batches import Batch
from workers.inference.hand import Hand
from workers.inference.watchdog import EXIT_OVERRUN, Watchdog

LOAD_S = 900.0
MakeBatch = Callable[..., Batch]


@pytest.fixture
def hand() -> Hand:
    return Hand("w", slots=2)


@pytest.fixture
def resident() -> Any:
    """Nothing is being loaded, unless a test says so."""
    loading: dict[str, float] = {}
    return SimpleNamespace(loading=lambda: loading)


@pytest.fixture
def overran() -> list[str]:
    """Models that were told to load for too long."""
    return []


@pytest.fixture
def ends() -> list[int]:
    """Exit codes the process would have ended with."""
    return []


@pytest.fixture
def watchdog(
    hand: Hand, resident: Any, overran: list[str], ends: list[int], clock: Any
) -> Watchdog:
    clock.advance(1000)
    return Watchdog(hand, resident, LOAD_S, overran.append, ends.append, clock.monotonic)


def test_a_batch_within_its_time_is_let_run(
    watchdog: Watchdog, hand: Hand, ends: list[int], clock: Any, make_batch: MakeBatch
) -> None:
    hand.hold(make_batch(max_run_s=60.0), "any").began_at = clock.monotonic()

    clock.advance(60)
    watchdog.look()

    assert ends == []


def test_a_batch_that_overruns_ends_the_process(
    watchdog: Watchdog, hand: Hand, ends: list[int], clock: Any, make_batch: MakeBatch
) -> None:
    hand.hold(make_batch(max_run_s=60.0), "any").began_at = clock.monotonic()

    clock.advance(60.1)
    watchdog.look()

    assert ends == [EXIT_OVERRUN]


def test_each_batch_has_the_time_of_its_own_model(
    watchdog: Watchdog, hand: Hand, ends: list[int], clock: Any, make_batch: MakeBatch
) -> None:
    for max_run_s in (1000.0, 5.0):
        hand.hold(make_batch(max_run_s=max_run_s), "any").began_at = clock.monotonic()

    clock.advance(4)
    watchdog.look()
    assert ends == []
    clock.advance(2)
    watchdog.look()

    assert ends == [EXIT_OVERRUN]


def test_a_batch_that_waits_or_is_being_reported_has_all_the_time(
    watchdog: Watchdog, hand: Hand, ends: list[int], clock: Any, make_batch: MakeBatch
) -> None:
    hand.hold(make_batch(), "any")

    clock.advance(1e6)
    watchdog.look()

    assert ends == []


def test_a_load_that_takes_too_long_is_told(
    watchdog: Watchdog, resident: Any, overran: list[str], clock: Any
) -> None:
    """Its thread hangs, and every batch for the model with it."""
    resident.loading()["stuck/1"] = clock.monotonic()

    clock.advance(LOAD_S)
    watchdog.look()
    assert overran == []

    clock.advance(0.1)
    watchdog.look()
    assert overran == ["stuck/1"]
