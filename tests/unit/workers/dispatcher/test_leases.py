"""Leases on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from workers.dispatcher.leases import Leases
from workers.dispatcher.memory import OpenJob


@pytest.fixture
def leases() -> Leases:
    return Leases(10.0)


def due(leases: Leases, now: float) -> list[str]:
    return [lease.batch_id for lease in leases.due(now)]


def test_a_lease_is_looked_at_when_it_may_have_run_out(leases: Leases) -> None:
    leases.grant("b", "w", [], 100.0)

    assert due(leases, 109.99) == []
    assert due(leases, 110.0) == ["b"]


def test_a_renewed_lease_is_looked_at_again_soon(leases: Leases) -> None:
    leases.grant("b", "w", [], 100.0)
    leases.renewed("b", 110.0)

    assert due(leases, 112.4) == []
    assert due(leases, 112.5) == ["b"]


def test_a_lease_is_taken_once(leases: Leases, make_open: Callable[..., OpenJob]) -> None:
    job = make_open()
    leases.grant("b", "w", [job], 100.0)

    lease = leases.take("b")

    assert lease is not None
    assert (lease.worker, lease.jobs) == ("w", [job])
    assert leases.take("b") is None
    assert not leases.holds("b")
    assert due(leases, 1e9) == []


def test_a_lease_of_another_is_none_of_ours(leases: Leases) -> None:
    leases.grant("b", "w", [], 100.0)
    leases.renewed("other", 100.0)

    assert leases.take("other") is None
    assert len(leases) == 1


def test_after_a_loss_every_lease_is_looked_at(leases: Leases) -> None:
    leases.grant("a", "w", [], 100.0)
    leases.grant("b", "w", [], 105.0)

    leases.all_due()

    assert due(leases, 105.0) == ["a", "b"]
