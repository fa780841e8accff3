"""The circuit breaker against floods of dead letters, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.settings import BreakerSettings
from workers.dispatcher.breaker import Breaker, CircuitKey

KEY = CircuitKey("echo", 1, "acme")
COOLDOWN_S, CAP_S = 30.0, 600.0

MakeBreaker = Callable[..., Breaker]


@pytest.fixture
def make_breaker() -> MakeBreaker:
    """`make_breaker(consecutive=3)`: neither limit is near unless it is given."""

    def make(**limits: float) -> Breaker:
        far: dict[str, float] = {"consecutive": 10**6, "min_jobs": 10**6}
        return Breaker(BreakerSettings.model_validate(far | limits))

    return make


@pytest.fixture
def breaker(make_breaker: MakeBreaker) -> Breaker:
    return make_breaker(consecutive=3)


def trip(breaker: Breaker, now: float, key: CircuitKey = KEY) -> None:
    while not breaker.record(key, False, now):
        assert breaker.allows(key, now)


# ── tripping ─────────────────────────────────────────────────────────────────────────────────────


def test_failures_in_a_row_open_the_circuit(breaker: Breaker) -> None:
    opened = [breaker.record(KEY, False, 0.0) for _ in range(3)]

    assert opened == [False, False, True]
    assert not breaker.allows(KEY, 0.0)
    assert breaker.open_keys() == {KEY: COOLDOWN_S}


def test_a_success_between_failures_starts_the_row_anew(breaker: Breaker) -> None:
    opened = [breaker.record(KEY, ok, 0.0) for ok in (False, False, True, False, False)]

    assert not any(opened)
    assert breaker.allows(KEY, 0.0)
    assert breaker.retry_at(KEY) is None


@pytest.mark.parametrize("circuit", ["echo 2 acme", "other 1 acme", "echo 1 other"])
def test_other_versions_models_and_tenants_go_on(breaker: Breaker, circuit: str) -> None:
    model, version, tenant = circuit.split()
    other = CircuitKey(model, int(version), tenant)
    breaker.record(other, False, 0.0)
    trip(breaker, 0.0)

    assert breaker.allows(other, 0.0)
    assert list(breaker.open_keys()) == [KEY]


def test_half_of_many_jobs_failing_opens_the_circuit(make_breaker: MakeBreaker) -> None:
    breaker = make_breaker(ratio=0.5, min_jobs=10)
    opened = [breaker.record(KEY, n % 2 == 0, 0.0) for n in range(10)]

    assert opened == [False] * 9 + [True]


def test_less_than_half_failing_does_not(make_breaker: MakeBreaker) -> None:
    breaker = make_breaker(ratio=0.5, min_jobs=10)

    assert not any(breaker.record(KEY, n % 3 > 0, 0.0) for n in range(1000))


def test_failures_long_ago_do_not_count(make_breaker: MakeBreaker) -> None:
    breaker = make_breaker(ratio=0.5, min_jobs=10, window_s=60)
    for n in range(9):
        breaker.record(KEY, False, float(n))

    assert not breaker.record(KEY, False, 60.0)
    assert breaker.allows(KEY, 60.0)


# ── probes ───────────────────────────────────────────────────────────────────────────────────────


def test_after_the_cool_down_one_probe_goes(breaker: Breaker) -> None:
    trip(breaker, 100.0)

    assert not breaker.allows(KEY, 129.9)
    assert breaker.allows(KEY, 130.0)
    breaker.sent(KEY, 130.0)
    assert not breaker.allows(KEY, 130.0)


def test_a_probe_that_succeeds_closes_the_circuit(breaker: Breaker) -> None:
    trip(breaker, 0.0)
    breaker.sent(KEY, 30.0)
    breaker.record(KEY, True, 31.0)

    assert breaker.allows(KEY, 31.0)
    assert breaker.open_keys() == {}
    assert not breaker.record(KEY, False, 31.0)


def test_one_success_in_the_probes_batch_is_enough_wherever_it_stands(breaker: Breaker) -> None:
    trip(breaker, 0.0)
    breaker.sent(KEY, 30.0)
    breaker.record(KEY, False, 31.0)
    breaker.record(KEY, True, 31.0)

    assert breaker.allows(KEY, 31.0)


def test_after_each_failed_probe_the_next_waits_twice_as_long_up_to_the_cap(
    breaker: Breaker,
) -> None:
    trip(breaker, 0.0)
    waits = []
    now = COOLDOWN_S
    for _ in range(60):
        breaker.sent(KEY, now)
        assert not breaker.record(KEY, False, now)
        retry_at = breaker.retry_at(KEY)
        assert retry_at is not None
        waits.append(retry_at - now)
        now = retry_at

    assert waits[:5] == [60.0, 120.0, 240.0, 480.0, CAP_S]
    assert set(waits[4:]) == {CAP_S}


def test_a_probe_that_never_ends_is_followed_by_another(breaker: Breaker) -> None:
    trip(breaker, 0.0)
    breaker.sent(KEY, 30.0)

    assert not breaker.allows(KEY, 89.9)
    assert breaker.allows(KEY, 90.0)


def test_what_was_under_way_when_it_opened_closes_nothing(breaker: Breaker) -> None:
    trip(breaker, 0.0)
    breaker.record(KEY, True, 1.0)

    assert not breaker.allows(KEY, 1.0)


def test_after_it_closed_the_cool_down_is_short_again(breaker: Breaker) -> None:
    trip(breaker, 0.0)
    breaker.sent(KEY, 30.0)
    breaker.record(KEY, True, 31.0)
    trip(breaker, 40.0)

    assert breaker.retry_at(KEY) == 40.0 + COOLDOWN_S


def test_what_is_sent_through_a_closed_circuit_is_no_probe(breaker: Breaker) -> None:
    breaker.sent(KEY, 0.0)
    breaker.record(KEY, False, 0.0)
    breaker.sent(KEY, 0.0)

    assert breaker.allows(KEY, 0.0)
    assert breaker.retry_at(KEY) is None


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


def test_the_key_unheard_of_for_longest_is_forgotten(make_breaker: MakeBreaker) -> None:
    breaker = make_breaker(consecutive=1, keys=3)
    keys = [CircuitKey("echo", 1, f"t{n}") for n in range(4)]
    for key in keys[:3]:
        breaker.record(key, False, 0.0)
    breaker.sent(keys[0], 30.0)
    breaker.record(keys[3], False, 30.0)

    assert set(breaker.open_keys()) == {keys[0], keys[2], keys[3]}
    assert breaker.allows(keys[1], 0.0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 40)), max_size=300))
def test_whatever_happens_an_open_circuit_lets_one_go_in_a_cool_down(
    story: list[tuple[bool, float]],
) -> None:
    """A dispatcher that sends whenever it may: between two sends through an open circuit that no
    success has closed, a cool-down passes."""
    breaker = Breaker(BreakerSettings(consecutive=2, cooldown_s=COOLDOWN_S))
    now, probed_at = 0.0, -COOLDOWN_S
    for ok, passed_s in story:
        now += passed_s
        if breaker.allows(KEY, now):
            if breaker.retry_at(KEY) is not None:
                assert now - probed_at >= COOLDOWN_S
                probed_at = now
            breaker.sent(KEY, now)
        breaker.record(KEY, ok, now)
        if breaker.retry_at(KEY) is None:
            probed_at = -COOLDOWN_S
