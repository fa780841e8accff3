"""Jobs change hands between dispatchers: each still ends once, and what is out with a worker is not run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.batches import ItemOutcome
from schemas.jobs import Job
from schemas.topics import RETRY

MakeJob = Callable[..., Job]
LEASE_S = 10.0
OUT_OF_MEMORY = ItemOutcome(code="device_out_of_memory", message="Full.", retry=True)


@pytest.fixture
def worlds(make_world: Any) -> tuple[Any, Any]:
    """Two dispatchers of one fleet. The first owns everything, the second nothing yet."""
    first, second = make_world(), make_world()
    second.consumer.receive = nothing = lambda *_, **__: []
    second.consumer.gained()
    assert second.consumer.receive is nothing
    return first, second


def hand_over(old: Any, new: Any) -> None:
    """All partitions move. What is open is given to the new owner, from the lowest incomplete on."""
    old.consumer.lose(*old.consumer.open)
    old.consumer.receive = lambda *_, **__: []
    new.consumer.__dict__.pop("receive", None)
    new.consumer.give()


def test_a_job_that_waited_is_run_by_its_new_owner(worlds: Any, make_job: MakeJob) -> None:
    old, new = worlds
    old.submit(make_job(id="a"))
    old.step()
    hand_over(old, new)
    old.offer()
    old.step()
    assert (old.memory.open, len(old.batcher), old.mailboxes.sent) == ({}, 0, [])

    new.step(2)
    new.work()
    new.step()

    assert new.log.statuses() == {"a": "succeeded"}


def test_a_batch_that_is_out_is_adopted_and_its_report_counts(
    worlds: Any, make_job: MakeJob
) -> None:
    old, new = worlds
    old.submit(make_job(id="a"), make_job(id="b"))
    old.offer()
    old.step()
    (batch,) = old.fetched()
    hand_over(old, new)
    old.step()
    new.offer()
    new.step(2)
    assert len(new.mailboxes.sent) == 1
    assert len(new.leases) == 1

    new.report(batch)
    old.step()
    new.clock.advance(0.5)
    new.step()

    assert new.log.statuses() == {"a": "succeeded", "b": "succeeded"}
    assert len(new.mailboxes.sent) == 1
    assert new.log.outcomes()[0].version == batch.version


def test_what_was_reported_while_nobody_owned_it_counts(worlds: Any, make_job: MakeJob) -> None:
    """The old owner is dead: nobody reads its inbox."""
    old, new = worlds
    old.submit(make_job(id="a"))
    old.offer()
    old.step()
    old.work()
    hand_over(old, new)
    new.offer()

    new.step(2)

    assert new.log.statuses() == {"a": "succeeded"}
    assert len(new.mailboxes.sent) == 1


def test_what_was_lost_and_came_back_while_it_was_asked_for_is_kept(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world()
    world.submit(make_job(id="a"))
    world.step()
    at = world.memory.open["a"].at

    def receive(*_: object, **__: object) -> Any:
        """The partitions are dealt out anew meanwhile, and come to the same member."""
        del world.consumer.receive
        world.consumer.lose(at)
        return [record for record in world.log.records[at.topic] if record.position == at]

    world.consumer.receive = receive
    world.step()
    world.consumer.open.add(at)
    world.offer()
    world.step()
    world.work()
    world.step()

    assert world.log.statuses() == {"a": "succeeded"}


def test_the_report_of_a_batch_is_kept_until_its_outcomes_are_written(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world()
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    world.report(batch)
    world.log.faults.fail("log.complete", times=2)
    world.try_steps(1)
    assert world.fleet.reported

    world.clock.advance(1)
    world.step(2)

    assert world.log.statuses() == {"a": "succeeded"}
    assert not world.fleet.reported


def test_a_batch_may_have_two_owners(worlds: Any, make_job: MakeJob) -> None:
    old, new = worlds
    old.submit(make_job(id="stays"), make_job(id="moves"))
    old.offer()
    old.step()
    (batch,) = old.fetched()
    moving = old.memory.open["moves"].at
    old.consumer.lose(moving)
    old.step()
    hand_over_one = [r for r in new.log.records[moving.topic] if r.position == moving]
    new.consumer.receive = lambda *_, **__: [hand_over_one.pop()] if hand_over_one else []
    new.consumer.open.add(moving)
    new.consumer.give()
    new.step()
    old.report(batch)

    old.step()
    assert old.log.statuses() == {"stays": "succeeded"}
    new.clock.advance(0.5)
    new.step()

    assert old.log.statuses() == {"stays": "succeeded", "moves": "succeeded"}
    assert len(old.mailboxes.sent) == 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_worker_that_dies_during_the_change_is_missed_by_the_new_owner(
    worlds: Any, make_job: MakeJob, begun: bool
) -> None:
    old, new = worlds
    old.submit(make_job(id="a"))
    old.offer()
    old.step()
    old.fetched(begin=begun)
    hand_over(old, new)
    old.step()
    new.step()
    new.clock.advance(LEASE_S + 1)
    new.offer()

    new.step(2)

    assert len(new.log.records[RETRY]) == begun
    if not begun:
        new.work()
        new.step()
        assert new.log.statuses() == {"a": "succeeded"}


def test_what_was_decided_and_not_written_is_the_new_owners_to_decide(
    worlds: Any, make_job: MakeJob, faults: Any
) -> None:
    old, new = worlds
    old.submit(make_job(id="a", key="k"), make_job(id="b"))
    old.offer()
    old.step()
    old.work()
    faults.always.add("log.complete")
    old.try_steps(1)
    assert len(old.outcomes) == 2
    faults.always.clear()
    hand_over(old, new)

    old.step()
    assert old.log.statuses() == {}
    new.step(2)

    assert sorted(new.log.statuses().values()) == ["succeeded", "succeeded"]
    hand_over(new, old)
    old.step(2)
    assert not old.consumer.open


def test_a_failed_attempt_is_not_judged_again_by_the_owner_of_the_retry(
    worlds: Any, make_job: MakeJob
) -> None:
    """Its report is still there, and names the same job."""
    old, new = worlds
    old.submit(make_job(id="a"))
    old.offer()
    old.step()
    (batch,) = old.fetched()
    old.report(batch, [OUT_OF_MEMORY])
    old.fleet.forget = lambda batch_ids: None
    old.step()
    hand_over(old, new)
    new.clock.advance(60)
    new.offer()
    new.step(2)
    (again,) = new.fetched()
    new.report(again)
    new.step()

    assert new.log.statuses() == {"a": "succeeded"}
    assert new.log.outcomes()[0].attempts == 2


def test_a_cancel_reaches_the_owner_of_the_job_whoever_owns_the_request(
    worlds: Any, make_job: MakeJob
) -> None:
    old, new = worlds
    old.submit(make_job(id="a"))
    old.step()
    hand_over(old, new)
    new.step()
    new.cancel("a")
    old.step()
    new.step()

    assert new.log.statuses() == {"a": "cancelled"}


def test_a_key_that_another_owner_answered_is_known(worlds: Any, make_job: MakeJob) -> None:
    old, new = worlds
    first = make_job(key="k")
    old.submit(first)
    old.offer()
    old.step()
    old.work()
    old.step()
    hand_over(old, new)
    new.submit(make_job(id=first.id, key="k"))
    new.offer()
    new.step(2)

    assert len(new.log.outcomes()) == 1
    assert new.consumer.open == set()


def test_while_the_fleet_cannot_be_asked_nothing_new_is_used(
    make_world: Any, make_job: MakeJob, faults: Any
) -> None:
    world = make_world()
    world.submit(make_job(id="a"))
    world.offer()
    faults.fail("fleet.assignments", times=2)

    world.try_steps(2)
    assert world.memory.open == {}
    world.try_steps(3)
    world.work()
    world.step()

    assert world.log.statuses() == {"a": "succeeded"}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whoever_owns_what_and_when_every_job_ends_once(
    make_world: Any, make_job: MakeJob, log: Any, fleet: Any, mailboxes: Any, data: st.DataObject
) -> None:
    log.forget()
    fleet.flush()
    mailboxes.take()
    owner, other = make_world(), make_world()
    other.consumer.receive = lambda *_, **__: []
    ids = [f"job-{i}" for i in range(data.draw(st.integers(1, 12), "jobs"))]
    owner.submit(*(make_job(id=id_) for id_ in ids))
    batches: list[Any] = []
    moves = ["step", "other", "offer", "fetch", "report", "fail", "hand over", "time"]
    for move in data.draw(st.lists(st.sampled_from(moves), max_size=40), "moves"):
        match move:
            case "step":
                owner.try_steps(1)
            case "other":
                other.try_steps(1)
            case "offer":
                owner.offer()
            case "fetch":
                batches += owner.fetched()
            case "report" if batches:
                owner.report(batches.pop())
            case "fail" if batches:
                batch = batches.pop()
                owner.report(batch, [OUT_OF_MEMORY] * len(batch.items))
            case "hand over":
                hand_over(owner, other)
                owner, other = other, owner
            case "time":
                owner.clock.advance(3.0)
    for _ in range(40):
        owner.clock.advance(LEASE_S)
        owner.offer(2)
        owner.try_steps(2)
        other.try_steps(1)
        owner.work()
        owner.try_steps(1)
    assert set(log.statuses()) == set(ids)
    assert owner.memory.open == {}
