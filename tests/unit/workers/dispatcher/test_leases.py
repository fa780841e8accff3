"""Leases on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schemas.batches import Assignment
from workers.dispatcher.leases import ADOPTED_POLL_S, VACANT_S, Leases
from workers.dispatcher.memory import OpenJob

MakeOpen = Callable[..., OpenJob]


@pytest.fixture
def leases() -> Leases:
    return Leases(10.0)


def due(leases: Leases, now: float) -> list[str]:
    return [lease.batch_id for lease in leases.due(now)]


def out(*jobs: OpenJob) -> Assignment:
    """A batch of these jobs that somebody else has sent."""
    return Assignment("b", "w", 7, [job.job.id for job in jobs], [job.job.attempt for job in jobs])


def test_a_lease_is_looked_at_when_it_may_have_run_out(leases: Leases, make_open: MakeOpen) -> None:
    leases.grant("b", "w", [make_open()], 100.0)

    assert due(leases, 109.99) == []
    assert due(leases, 110.0) == ["b"]


def test_a_renewed_lease_is_looked_at_again_soon(leases: Leases, make_open: MakeOpen) -> None:
    leases.grant("b", "w", [make_open()], 100.0)
    leases.renewed("b", 110.0)

    assert due(leases, 112.4) == []
    assert due(leases, 112.5) == ["b"]


def test_a_lease_is_settled_once(leases: Leases, make_open: MakeOpen) -> None:
    job = make_open()
    leases.grant("b", "w", [job], 100.0)

    assert leases.settle("b") == [job]
    assert leases.settle("b") is None
    assert due(leases, 1e9) == []


def test_a_lease_of_another_is_none_of_ours(leases: Leases, make_open: MakeOpen) -> None:
    leases.grant("b", "w", [make_open()], 100.0)
    leases.renewed("other", 100.0)

    assert leases.settle("other") is None
    assert len(leases) == 1


def test_after_a_loss_every_lease_is_looked_at(leases: Leases, make_open: MakeOpen) -> None:
    leases.grant("a", "w", [make_open()], 100.0)
    leases.grant("b", "w", [make_open()], 105.0)

    leases.all_due()

    assert due(leases, 105.0) == ["a", "b"]


# ── change of ownership ──────────────────────────────────────────────────────────────────────────


def test_what_an_adopted_batch_holds_is_known_and_its_places_are_taken(
    leases: Leases, make_open: MakeOpen
) -> None:
    ours, theirs = make_open(id="ours"), make_open(id="theirs")
    leases.adopt(out(theirs, ours), 100.0)
    assert (len(leases), due(leases, 1e9)) == (0, [])
    vacancy = leases.vacancy(ours.job)
    assert vacancy is not None
    assert vacancy.version == 7

    leases.occupy(ours)

    assert leases.vacancy(ours.job) is None
    assert due(leases, 100.0) == ["b"]
    assert leases.settle("b") == [None, ours]


def test_an_adopted_batch_is_looked_after_often(leases: Leases, make_open: MakeOpen) -> None:
    job = make_open()
    leases.adopt(out(job), 100.0)
    leases.occupy(job)
    leases.renewed("b", 100.0)

    assert due(leases, 100.0 + ADOPTED_POLL_S) == ["b"]


def test_another_attempt_at_a_job_has_no_place_in_the_batch_of_an_earlier_one(
    leases: Leases, make_open: MakeOpen
) -> None:
    leases.adopt(out(make_open(id="a")), 100.0)

    assert leases.vacancy(make_open(id="a", attempt=1).job) is None


def test_a_report_that_came_before_the_record_of_a_job_still_counts_for_it(
    leases: Leases, make_open: MakeOpen
) -> None:
    early, late = make_open(id="early"), make_open(id="late")
    leases.adopt(out(early, late), 100.0)
    leases.occupy(early)
    assert leases.settle("b") == [early, None]

    leases.occupy(late)

    assert due(leases, 100.0) == ["b"]
    assert leases.settle("b") == [None, late]
    assert leases.settle("b") is None


def test_a_job_that_was_lost_leaves_its_place_and_may_come_back_to_it(
    leases: Leases, make_open: MakeOpen
) -> None:
    kept, lost = make_open(id="kept"), make_open(id="lost")
    leases.grant("b", "w", [kept, lost], 100.0)

    leases.vacate({lost.at})
    assert [lease.held for lease in leases] == [[kept]]
    leases.occupy(lost)

    assert leases.settle("b") == [kept, lost]


def test_what_is_on_record_is_not_adopted_over(leases: Leases, make_open: MakeOpen) -> None:
    job = make_open()
    leases.grant("b", "w", [job], 100.0)

    leases.adopt(out(job), 100.0)

    assert leases.vacancy(job.job) is None
    assert leases.settle("b") == [job]


def test_a_batch_that_ended_leaves_no_vacant_places(leases: Leases, make_open: MakeOpen) -> None:
    job = make_open()
    leases.adopt(out(job), 100.0)

    leases.end("b")

    assert leases.vacancy(job.job) is None


def test_batches_with_no_job_of_ours_are_dropped_after_a_while(
    leases: Leases, make_open: MakeOpen
) -> None:
    job, other = make_open(id="a"), make_open(id="other")
    leases.adopt(out(job), 100.0)
    leases.grant("mine", "w", [other], 100.0)

    leases.drop_vacant(100.0 + VACANT_S)
    assert leases.vacancy(job.job) is not None
    leases.drop_vacant(100.1 + VACANT_S)

    assert leases.vacancy(job.job) is None
    assert len(leases) == 1
