"""Which lane goes next: every lane its share, none starved, none with credit saved up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.topics import LANES, Lane
from workers.dispatcher.fairness import WEIGHTS, LaneClock

lanes = st.sampled_from(LANES)
some_lanes = st.sets(lanes, min_size=1)
costs = st.integers(1, 32)
LARGEST_COST = 32


def serve(clock: LaneClock, waiting: set[Lane], cost: float = 1) -> Lane:
    lane = clock.pick(waiting)
    assert lane is not None
    clock.charge(lane, cost)
    return lane


def test_nothing_waiting_is_nothing_to_serve() -> None:
    assert LaneClock().pick(set()) is None


def test_the_heaviest_lane_goes_first_and_all_go_in_a_round() -> None:
    clock = LaneClock()
    round_ = [serve(clock, set(LANES)) for _ in range(int(sum(WEIGHTS.values())))]

    assert round_[:4] == ["premium", "standard", "basic", "bulk"]
    assert Counter(round_) == WEIGHTS


@given(st.integers(15, 300))
def test_lanes_that_all_wait_are_served_in_proportion(served: int) -> None:
    clock = LaneClock()
    counts = Counter(serve(clock, set(LANES)) for _ in range(served))

    for lane, weight in WEIGHTS.items():
        assert abs(counts[lane] - served * weight / sum(WEIGHTS.values())) <= 2


@given(st.lists(costs, min_size=300, max_size=400))
def test_the_share_is_of_the_cost_not_of_the_turns(costs: list[int]) -> None:
    clock = LaneClock()
    spent = dict.fromkeys(LANES, 0.0)
    for cost in costs:
        spent[serve(clock, set(LANES), cost)] += cost

    turned = [spent[lane] / WEIGHTS[lane] for lane in LANES]
    assert max(turned) - min(turned) <= 2 * LARGEST_COST


@given(st.lists(st.tuples(some_lanes, costs), max_size=200), lanes)
def test_no_lane_is_starved_whatever_happened_before(
    before: list[tuple[set[Lane], int]], lane: Lane
) -> None:
    clock = LaneClock()
    for waiting, cost in before:
        serve(clock, waiting, cost)

    waits = 0
    while serve(clock, set(LANES), LARGEST_COST) != lane:
        waits += 1
    # Its own last turn may have cost the most there is; the others move on by as much meanwhile.
    assert waits <= 2 * sum(WEIGHTS.values()) / WEIGHTS[lane]


@given(st.lists(st.tuples(some_lanes, costs), max_size=200))
def test_the_choice_is_among_those_that_wait(steps: list[tuple[set[Lane], int]]) -> None:
    clock = LaneClock()
    for waiting, cost in steps:
        assert serve(clock, waiting, cost) in waiting


@pytest.mark.parametrize("idle", LANES)
def test_a_lane_that_was_idle_comes_back_without_credit(idle: Lane) -> None:
    clock = LaneClock()
    for _ in range(10_000):
        serve(clock, set(LANES) - {idle})

    back = Counter(serve(clock, set(LANES)) for _ in range(60))

    assert abs(back[idle] - 60 * WEIGHTS[idle] / sum(WEIGHTS.values())) <= 2


@pytest.mark.parametrize("busy", LANES)
def test_a_lane_that_had_everything_to_itself_owes_nothing_for_it(busy: Lane) -> None:
    clock = LaneClock()
    for _ in range(10_000):
        serve(clock, {busy})

    back = Counter(serve(clock, set(LANES)) for _ in range(60))

    assert abs(back[busy] - 60 * WEIGHTS[busy] / sum(WEIGHTS.values())) <= 2


def test_bulk_gets_its_share_of_slots_for_any_beside_slots_for_live_lanes() -> None:
    clock = LaneClock()
    live: set[Lane] = {"premium", "standard", "basic"}
    served = Counter(serve(clock, live if turn % 3 == 0 else set(LANES)) for turn in range(300))

    assert served["bulk"] >= 300 / sum(WEIGHTS.values()) - 2
