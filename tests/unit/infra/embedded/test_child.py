from __future__ import annotations

from pathlib import Path

import pytest

from infra.embedded.child import BACKOFF_CAP_S, FAILING_DEATHS, Restarts, rotate


def test_a_child_that_keeps_dying_waits_twice_as_long_each_time_up_to_the_cap() -> None:
    restarts = Restarts()

    delays = [restarts.died(ready_for_s=None) for _ in range(8)]

    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, BACKOFF_CAP_S, BACKOFF_CAP_S])
    assert restarts.count == 8


@pytest.mark.parametrize(
    ("healthy_s", "delay_s"), [(1.9, 0.4), (2.1, 0.2)], ids=["too short", "long enough"]
)
def test_ten_delays_of_health_start_the_delays_over(healthy_s: float, delay_s: float) -> None:
    restarts = Restarts()
    restarts.died(ready_for_s=0)

    assert restarts.died(ready_for_s=healthy_s) == pytest.approx(delay_s)


def test_half_a_minute_of_health_starts_the_longest_delay_over() -> None:
    restarts = Restarts(count=9, delay_s=BACKOFF_CAP_S)

    assert restarts.died(ready_for_s=29) == BACKOFF_CAP_S
    assert restarts.died(ready_for_s=31) == pytest.approx(0.2)


def test_only_deaths_before_it_was_ready_make_a_child_failing() -> None:
    restarts = Restarts()
    for _ in range(FAILING_DEATHS):
        restarts.died(ready_for_s=0.5)
    assert not restarts.failing

    for _ in range(FAILING_DEATHS):
        restarts.died(ready_for_s=None)
    assert restarts.failing


def test_a_large_log_is_moved_aside_and_its_writer_goes_on_at_the_front(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"old " * 10)
        rotate(log, limit_bytes=20)
        writer.write(b"new")

    assert log.read_bytes() == b"new"
    assert (tmp_path / "worker-0.log.1").read_bytes() == b"old " * 10


def test_a_small_log_stays_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    rotate(log)
    log.write_bytes(b"few words")
    rotate(log)

    assert log.read_bytes() == b"few words"
    assert list(tmp_path.iterdir()) == [log]
