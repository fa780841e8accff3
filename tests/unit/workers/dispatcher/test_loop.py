"""The dispatcher's story from end to end, over fakes that fail when told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.fleet import SlotToken, WorkerBeat
from infra.settings import BreakerSettings
from schemas.batches import ItemOutcome
from schemas.errors import Transient
from schemas.jobs import Job
from schemas.payloads import Payload
from schemas.topics import LANES, RESULTS
from workers.dispatcher.loop import IDLE_S, LOOK_S, RUNG_S, TIDY_EVERY_S
from workers.dispatcher.waiting import TURNS_PER_S, WAIT_MIN_S

MakeJob = Callable[..., Job]

PASSING = ItemOutcome(code="storage_unavailable", message="Away.", retry=True)
NOT_BUILT = ItemOutcome(code="engine_not_built", message="Not built yet.", retry=True)
LEASE_S = 10.0


def offered(world: Any) -> list[SlotToken]:
    return [token for tokens in world.fleet.slots.values() for token in tokens]


def assert_no_job_is_out_twice(world: Any) -> None:
    runnable = world.runnable()
    assert len(set(runnable)) == len(runnable), f"a job is out twice: {runnable}"


def finish(world: Any, rounds: int = 60) -> None:
    """Let a healthy worker work until everything has ended."""
    for _ in range(rounds):
        world.clock.advance(LEASE_S / 4)
        world.offer(2)
        world.try_steps(2)
        world.work()
        world.try_steps(1)
        if not world.memory.open and not world.consumer.open:
            return
    raise AssertionError(f"left over: {sorted(world.memory.open)} {world.consumer.open}")


# ── the way of a job ─────────────────────────────────────────────────────────────────────────────


def test_a_job_goes_in_is_leased_sent_run_and_its_result_comes_out(
    world: Any, make_job: MakeJob, noon: float
) -> None:
    job = make_job(
        id="a", reply_to="client", params={"k": 5}, traceparent=f"00-{'a' * 32}-{'b' * 16}-01"
    )
    world.submit(job)
    (token,) = world.offer()

    world.step()
    ((worker, batch_id, slot),) = world.mailboxes.sent
    assert (worker, slot) == ("w", token)
    (batch,) = world.fetched()
    assert (batch.id, batch.model, batch.version) == (batch_id, "echo", 1)
    assert (batch.reply_to, batch.lease_s, batch.max_run_s, batch.alone) == (0, LEASE_S, 60, False)
    (item,) = batch.items
    assert (item.job_id, item.tenant, item.payload, item.params) == (
        "a", "default", job.payload, {"k": 5},
    )  # fmt: skip
    assert (item.submitted_at, item.deadline_at, item.trace_id) == (noon, noon + 3600, "a" * 32)
    assert world.log.statuses() == {}

    world.report(batch)
    world.step()

    (record,) = world.log.records[RESULTS]
    assert record.key == "a"
    assert world.log.statuses() == {"a": "succeeded"}
    assert world.view.statuses() == {"a": "succeeded"}
    assert world.view.told == {"client": ["a"]}
    assert world.consumer.open == set()
    assert len(world.leases) == 0


def test_without_a_slot_jobs_gather_and_leave_together(world: Any, make_job: MakeJob) -> None:
    for id_ in "abc":
        world.submit(make_job(id=id_))
        world.step()
    world.offer(2)

    world.step()

    (batch,) = world.fetched()
    assert [item.job_id for item in batch.items] == ["a", "b", "c"]


def test_a_slot_that_finds_no_use_is_given_back(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a"))
    world.step()
    (token,) = world.offer()
    world.cancel("a")

    world.step(2)

    assert world.mailboxes.sent == []
    assert offered(world) == [token]
    assert world.log.statuses() == {"a": "cancelled"}


def holds(world: Any, worker: str, *engines: str) -> None:
    """The worker says what it has loaded."""
    beat = WorkerBeat(
        worker=worker, life="life", pid=1, started_at=0.0, ready=True, draining=False, slots=1,
        batches=[], engines=list(engines), memory_bytes=0, jobs_done=0,
    )  # fmt: skip
    world.fleet.beat(beat, [], 0)


def test_a_batch_goes_to_a_worker_that_has_its_model_loaded(world: Any, make_job: MakeJob) -> None:
    holds(world, "other", "another/1")
    holds(world, "holder", "echo/1")
    world.step()
    (others,) = world.offer(worker="other")
    world.offer(worker="holder")
    world.submit(make_job(id="a"))

    world.step(2)

    ((worker, _, _),) = world.mailboxes.sent
    assert worker == "holder"
    assert offered(world) == [others]


def test_a_batch_whose_model_is_loaded_by_busy_workers_goes_anywhere(
    world: Any, make_job: MakeJob
) -> None:
    holds(world, "other")
    holds(world, "holder", "echo/1")
    world.step()
    world.offer(worker="other")
    world.submit(make_job(id="a"))

    world.step(2)

    ((worker, _, _),) = world.mailboxes.sent
    assert worker == "other"


def test_as_many_batches_are_sent_as_there_are_slots(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(max_jobs=2)
    world.submit(*(make_job() for _ in range(10)))
    world.offer(3)

    world.step(2)

    assert [len(batch.items) for batch in world.fetched()] == [2, 2, 2]
    assert offered(world) == []
    assert len(world.batcher) == 4


def test_bulk_leaves_the_slots_of_live_lanes_alone(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(lane="bulk"))
    world.offer(1, seat="live")

    world.step(3)
    assert world.mailboxes.sent == []

    world.submit(make_job(id="b", lane="basic"))
    world.step(2)
    (batch,) = world.fetched()
    assert [item.job_id for item in batch.items] == ["b"]


@pytest.mark.parametrize("lane", LANES)
def test_every_lane_is_served_while_the_others_are_flooded(
    make_world: Any, make_job: MakeJob, lane: str
) -> None:
    world = make_world(max_jobs=1)
    for other in LANES:
        world.submit(*(make_job(lane=other) for _ in range(50)))
    world.submit(make_job(id="mine", lane=lane, priority=9))
    for _ in range(40):
        world.offer(1)
        world.step()
        world.work()

    world.step()

    assert world.log.statuses().get("mine") == "succeeded"


def test_a_slot_of_a_dead_worker_is_passed_over(world: Any, make_job: MakeJob) -> None:
    world.offer(2, worker="dead")
    world.fleet.alive.discard("dead")
    world.offer(1, worker="w")
    world.submit(make_job(id="a"))

    world.step(4)

    assert [worker for worker, _, _ in world.mailboxes.sent] == ["w"]


def test_with_nothing_to_do_it_asks_for_no_slot_and_sleeps(world: Any, make_job: MakeJob) -> None:
    world.offer(1)

    world.step(2)

    assert all(seats == [] and timeout_s == IDLE_S for seats, timeout_s in world.fleet.waits)
    assert len(offered(world)) == 1


def test_what_the_bell_announced_is_waited_for_on_the_log_for_a_while(world: Any) -> None:
    world.fleet.rung = True
    world.step(2)
    world.clock.advance(RUNG_S)
    world.step()

    assert [timeout_s for _, timeout_s in world.fleet.waits] == [IDLE_S, 0, IDLE_S]
    assert world.consumer.waited_s == [LOOK_S, LOOK_S, 0]


def test_once_it_has_come_it_is_not_waited_for_any_more(world: Any, make_job: MakeJob) -> None:
    world.fleet.rung = True
    world.offer()
    world.submit(make_job(id="a"))

    world.step(2)

    assert world.consumer.waited_s == [LOOK_S, 0]


def test_with_no_room_for_what_the_bell_announced_it_does_not_spin(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(window_bytes=1000)
    world.submit(make_job(id="a", payload=Payload("text/plain", b"x" * 1000)))
    world.step()
    world.fleet.waits.clear()

    for _ in range(3):
        world.fleet.rung = True
        world.step()

    assert all(timeout_s == IDLE_S for _, timeout_s in world.fleet.waits)


def test_it_wakes_when_a_delayed_job_may_go_on(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    world.report(batch, [PASSING])
    world.step(2)
    not_before = world.intake.next_wake()
    assert not_before is not None

    world.clock.advance(not_before - world.clock.wall() - 0.1)
    world.step()
    assert 0 < world.fleet.waits[-1][1] <= 0.1 + 1e-6

    world.clock.advance(0.1 + 1e-6)
    world.step()
    world.offer()
    world.step()
    assert len(world.fetched()) == 1


def test_when_what_many_jobs_wait_for_is_there_one_finds_out_for_all(
    world: Any, make_job: MakeJob
) -> None:
    """They take turns in asking, which is long for a crowd, and short once it is there."""
    world.submit(*(make_job(id=str(number)) for number in range(2000)))
    while world.intake.delayed < 2000:
        world.offer()
        world.step()
        for batch in world.fetched():
            world.report(batch, [NOT_BUILT] * len(batch.items))
    world.offer(500)

    world.clock.advance(WAIT_MIN_S)
    for _ in range(100):
        world.step()
        world.work()
        world.clock.advance(TIDY_EVERY_S / 5)

    assert len(world.log.outcomes()) == 2000


def test_a_worker_that_lacks_what_another_has_does_not_keep_jobs_from_that(
    world: Any, make_job: MakeJob
) -> None:
    """The one refuses at once, the other takes 0.4 s for a batch and could do all in 13 s: it goes on getting some, and
    what is refused is not written to the log without end."""
    world.submit(*(make_job(id=str(number)) for number in range(2000)))
    holds(world, "has", "echo/1")
    holds(world, "lacks")
    world.offer(2, worker="has")
    world.offer(2, worker="lacks")
    busy: list[tuple[float, Any]] = []
    step_s = 0.02
    for _ in range(int(30 / step_s)):
        world.step()
        now = world.clock.wall()
        for worker, batch_id, _ in world.mailboxes.take():
            if (batch := world.fleet.fetch(batch_id)) is None:
                continue
            world.fleet.begin(batch)
            if worker == "has":
                busy.append((now + 0.4, batch))
            else:
                world.report(batch, [NOT_BUILT] * len(batch.items))
                world.offer(1, worker="lacks")
        for entry in [entry for entry in busy if entry[0] <= now]:
            busy.remove(entry)
            world.report(entry[1])
            world.offer(1, worker="has")
        world.clock.advance(step_s)

    assert len(world.log.outcomes()) > 1000
    assert world.outcomes.counts["deferred"] < 30 * 3 * TURNS_PER_S


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0])
def test_a_job_waits_for_company_no_longer_than_the_model_says(
    make_world: Any, make_job: MakeJob, noon: float, ahead_s: float
) -> None:
    """However far the producer's clock is ahead."""
    world = make_world(max_delay_ms=50)
    world.submit(make_job(submitted_at=noon + ahead_s))
    world.offer()
    world.step()

    world.clock.advance(0.06)
    world.step(2)

    assert len(world.fetched()) == 1


def test_a_large_payload_goes_by_reference_and_takes_no_room(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(window_bytes=100)
    data = Payload("text/plain", data=b"x" * 60)
    world.submit(*(make_job(payload=data) for _ in range(3)))
    world.step()
    assert world.memory.held_bytes <= 120


def test_jobs_are_looked_through_for_deadlines_now_and_then_not_at_every_step(
    world: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at every waiting job, of which there may be tens of thousands."""
    looks = []
    look = world.batcher.past_deadline

    def counted(now: float) -> Any:
        looks.append(now)
        return look(now)

    monkeypatch.setattr(world.batcher, "past_deadline", counted)
    for _ in range(100):
        world.submit(make_job())
        world.step()

    assert len(looks) <= 2


def test_a_job_that_waits_without_a_slot_expires(
    world: Any, make_job: MakeJob, noon: float
) -> None:
    world.submit(make_job(id="a", deadline_at=noon + 5))
    world.step()

    world.clock.advance(5.5)
    world.step()

    assert world.log.statuses() == {"a": "expired"}


def test_a_job_that_runs_for_a_while_is_shown_as_running(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()

    world.clock.advance(1)
    world.step()
    assert world.view.statuses() == {"a": "running"}

    world.report(batch)
    world.step()
    world.clock.advance(1)
    world.step()
    assert world.view.statuses() == {"a": "succeeded"}


# ── leases ───────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_whose_lease_is_renewed_stays_out(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    for _ in range(20):
        world.clock.advance(5)
        world.fleet.leases[batch.id] = world.clock.monotonic() + LEASE_S
        world.offer(1)
        world.step()
    assert len(world.mailboxes.sent) == 1

    world.report(batch)
    world.step()

    assert world.log.statuses() == {"a": "succeeded"}


def test_a_batch_whose_message_was_lost_comes_back_after_one_lease(
    world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    world.mailboxes.take()

    world.clock.advance(LEASE_S + 0.1)
    world.offer(worker="w2")
    world.step(2)
    world.work()
    world.step()

    assert world.log.statuses() == {"a": "succeeded"}
    assert world.log.outcomes()[0].attempts == 1


def test_a_report_that_is_in_the_inbox_when_its_lease_is_missed_counts(
    world: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker reports between the dispatcher's look into its inbox and its look at the leases."""
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    world.clock.advance(LEASE_S - 0.1)
    world.fleet.leases[batch.id] = world.clock.monotonic() + LEASE_S
    world.clock.advance(0.2)
    look = world.fleet.phases

    def report_first(batch_ids: Any) -> Any:
        monkeypatch.undo()
        world.report(batch)
        return look(batch_ids)

    monkeypatch.setattr(world.fleet, "phases", report_first)
    world.step(2)

    assert world.log.statuses() == {"a": "succeeded"}
    assert world.settlement.redispatched == 0


def test_a_late_report_of_a_batch_that_was_given_to_another_is_ignored(
    world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (late,) = world.fetched(begin=False)
    world.clock.advance(LEASE_S + 0.1)
    world.offer(worker="w2")
    world.step(2)
    (again,) = world.fetched()

    world.report(late)
    world.step()
    assert world.log.statuses() == {}
    world.report(again)
    world.step()

    assert world.log.statuses() == {"a": "succeeded"}


def test_poison_fails_alone_and_its_neighbours_succeed(world: Any, make_job: MakeJob) -> None:
    """A batch of 32 with one job that takes its worker down each time."""
    world.submit(*(make_job(id=f"good-{i}") for i in range(31)), make_job(id="poison"))
    runs = []
    for _ in range(400):
        world.clock.advance(1)
        world.offer(1)
        world.step()
        for batch in world.fetched():
            ids = [item.job_id for item in batch.items]
            if "poison" in ids:
                runs.append(len(ids))
                world.fleet.leases.pop(batch.id)
            else:
                world.report(batch)

    statuses = world.log.statuses()
    assert runs == [32, 1, 1]
    assert statuses.pop("poison") == "failed"
    assert len(statuses) == 31
    assert set(statuses.values()) == {"succeeded"}
    (letter,) = world.log.records["jobs.text.standard.dlq"]
    assert (letter.key, letter.headers["x-error"]) == ("poison", "worker_died")


def test_suspects_are_sent_to_run_alone(world: Any, make_job: MakeJob) -> None:
    world.submit(*(make_job() for _ in range(3)))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    world.fleet.leases.pop(batch.id)
    world.clock.advance(60)
    world.step(2)
    world.clock.advance(60)
    world.offer(5)

    world.step(2)

    batches = world.fetched()
    assert [(len(batch.items), batch.alone) for batch in batches] == [(1, True)] * 3


def test_losing_all_of_redis_loses_no_job_charges_none_and_shows_each_once(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(max_jobs=4)
    world.submit(*(make_job(id=str(i)) for i in range(40)))
    world.offer(4)
    world.step()
    first = world.fetched()
    world.report(first[0])
    world.step()

    world.fleet.flush()
    world.view.forget()
    world.mailboxes.take()
    finish(world)

    assert set(world.log.statuses().values()) == {"succeeded"}
    assert len(world.log.statuses()) == 40
    assert {outcome.attempts for outcome in world.log.outcomes()} == {1}
    assert world.view.statuses() == world.log.statuses()


def test_after_redis_lost_its_memory_running_jobs_go_again_without_waiting_for_a_lease_to_end(
    world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    world.fetched()
    world.fleet.flush()
    world.view.forget()

    for _ in range(4):
        world.clock.advance(0.5)
        world.offer()
        world.step()

    assert [batch.items[0].job_id for batch in world.fetched()] == ["a"]


def test_a_view_that_lost_its_memory_comes_back_though_nothing_ends_any_more(
    world: Any, make_job: MakeJob
) -> None:
    """Clients that wait for jobs of before look into the view."""
    world.submit(make_job(id="a"))
    finish(world)
    world.view.forget()

    for _ in range(10):
        world.clock.advance(1)
        world.step()

    assert world.view.statuses() == {"a": "succeeded"}


# ── failures ─────────────────────────────────────────────────────────────────────────────────────

CALLS_OF_A_SEND = ["fleet.take_slot", "fleet.lease", "mailboxes.send"]


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("call", CALLS_OF_A_SEND)
def test_whichever_call_of_a_send_fails_nothing_is_lost_and_no_job_is_out_twice(
    make_world: Any, make_job: MakeJob, faults: Any, call: str, answer_lost: bool
) -> None:
    world = make_world(max_jobs=2)
    world.submit(*(make_job(id=id_) for id_ in "abcdef"))
    world.step()
    world.offer(3)
    if answer_lost:
        faults.lose_answer(call)
    else:
        faults.fail(call)

    for _ in range(6):
        world.try_steps(1)
        world.offer(1)
        assert_no_job_is_out_twice(world)
    finish(world)

    assert world.log.statuses() == dict.fromkeys("abcdef", "succeeded")
    assert {outcome.attempts for outcome in world.log.outcomes()} == {1}


@pytest.mark.parametrize("call", CALLS_OF_A_SEND)
def test_when_a_send_fails_no_slot_is_offered_that_already_has_a_batch(
    make_world: Any, make_job: MakeJob, faults: Any, call: str
) -> None:
    """The worker would get more batches at once than it has hands for."""
    world = make_world(max_jobs=1)
    world.submit(*(make_job() for _ in range(6)))
    world.step()
    world.offer(2)
    world.fleet.waits.clear()
    calls = {"fleet.lease": 1, "mailboxes.send": 1, "fleet.take_slot": 0}[call]

    def fail_later() -> None:
        """The first batch of the step goes well, what comes after it fails."""
        nonlocal calls
        begin = faults.begin

        def counted(name: str) -> None:
            nonlocal calls
            if name == call:
                calls -= 1
                if calls < 0:
                    faults.begin = begin
                    raise Transient("told_to_fail", name)
            begin(name)

        faults.begin = counted

    fail_later()
    with pytest.raises(Transient):
        world.step()

    used = {token for _, _, token in world.mailboxes.sent}
    assert len(used) == 1
    assert not used & set(offered(world))


def test_when_the_log_fails_at_the_end_of_a_step_a_slot_is_not_lost(
    world: Any, make_job: MakeJob, faults: Any
) -> None:
    """The worker would miss it for some beats, and stand idle for them."""
    world.submit(make_job(id="a"))
    world.step()
    (token,) = world.offer()
    world.cancel("a")
    faults.fail("log.complete")

    world.try_steps(3)

    assert offered(world) == [token]
    assert world.log.statuses() == {"a": "cancelled"}


def test_when_the_log_cannot_be_read_a_slot_goes_to_a_job_in_hand(
    world: Any, make_job: MakeJob, faults: Any
) -> None:
    world.submit(make_job(id="a"))
    world.step()
    (token,) = world.offer()
    faults.fail("log.receive")

    with pytest.raises(Transient):
        world.step()

    assert [sent for _, _, sent in world.mailboxes.sent] == [token]


def test_a_log_that_does_not_take_outcomes_gets_them_later_and_once(
    world: Any, make_job: MakeJob, faults: Any
) -> None:
    world.submit(make_job(id="a", reply_to="c"))
    world.offer()
    world.step()
    world.work()
    faults.always.add("log.complete")

    world.try_steps(3)
    assert world.log.statuses() == world.view.told == {}
    faults.always.clear()
    world.try_steps(2)

    assert world.log.statuses() == {"a": "succeeded"}
    assert world.view.told == {"c": ["a"]}


def test_while_the_log_takes_no_outcomes_nothing_new_is_taken_in(
    world: Any, make_job: MakeJob, faults: Any
) -> None:
    world.submit(make_job(model="unknown"))
    faults.always.add("log.complete")
    world.try_steps(1)
    world.submit(*(make_job() for _ in range(10)))

    world.try_steps(10)

    assert len(world.batcher) == 0


def test_while_redis_is_away_nothing_is_lost(world: Any, make_job: MakeJob, faults: Any) -> None:
    world.submit(*(make_job(id=id_) for id_ in "ab"))
    world.offer()
    world.step()
    faults.always |= {"fleet", "mailboxes", "view"}
    for _ in range(20):
        with pytest.raises(Transient):
            world.step()
        world.clock.advance(1)
    faults.always.clear()

    finish(world)

    assert world.log.statuses() == dict.fromkeys("ab", "succeeded")


def test_a_redis_that_stood_still_for_longer_than_a_lease_charges_nobody(
    make_world: Any, make_job: MakeJob, faults: Any
) -> None:
    """The worker lives and works on; only its lease could not be renewed."""
    world = make_world(max_attempts=1)
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    faults.always.add("fleet")
    world.clock.advance(1.5 * LEASE_S)
    with pytest.raises(Transient):
        world.step()
    faults.always.clear()

    world.step()
    beat = WorkerBeat(
        worker="w", life="life", pid=1, started_at=0.0, ready=True, draining=False, slots=3,
        batches=[batch.id], engines=[], memory_bytes=0, jobs_done=0,
    )  # fmt: skip
    world.fleet.beat(beat, [batch.id], int(LEASE_S * 1000))
    world.clock.advance(1)
    world.step()
    if world.fleet.leased(batch.id):
        world.report(batch)
    finish(world)

    (outcome,) = world.log.outcomes()
    assert (outcome.status, outcome.attempts) == ("succeeded", 1)


def test_jobs_in_hand_go_on_while_another_model_cannot_be_looked_up(
    world: Any, make_job: MakeJob
) -> None:
    world.models.unreachable.add("far")
    world.submit(make_job(id="a"))
    world.step()
    world.submit(make_job(model="far"))
    world.offer()

    world.try_steps(3)

    assert len(world.fetched()) == 1


STEPS = st.lists(
    st.sampled_from(
        [
            "submit", "submit", "serve", "serve", "cancel", "offer", "step", "work", "die",
            "give back", "fail items", "wait", "flush", "fail fleet", "lose fleet", "fail send",
            "lose send", "fail log", "fail view", "crash",
        ]
    ),
    min_size=5,
    max_size=60,
)  # fmt: skip


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STEPS, st.randoms(use_true_random=False))
def test_whatever_happens_each_accepted_job_ends_once(
    make_world: Any, make_job: MakeJob, log: Any, fleet: Any, faults: Any, view: Any,
    mailboxes: Any, steps: list[str], random: Any,
) -> None:  # fmt: skip
    log.forget()
    fleet.flush()
    view.forget()
    mailboxes.take()
    world = make_world(max_jobs=3, max_attempts=5)
    submitted: list[str] = []
    fleet_calls = [
        "wait",
        "take_slot",
        "lease",
        "phases",
        "offer",
        "reports",
        "forget",
        "assignments",
    ]
    faults.before.clear()
    faults.after.clear()
    for step in steps:
        match step:
            case "submit":
                submitted.append(f"j{len(submitted)}")
                world.submit(make_job(id=submitted[-1], lane=random.choice(LANES)))
            case "cancel" if submitted:
                world.cancel(random.choice(submitted))
            case "offer":
                world.offer(random.randint(1, 3), seat=random.choice(["any", "live"]))
            case "step":
                world.try_steps(1)
            case "serve":
                world.offer(2)
                world.try_steps(2)
                world.work()
                world.try_steps(1)
            case "work":
                world.work()
            case "die":
                for batch in world.fetched(begin=random.random() < 0.5):
                    world.fleet.leases.pop(batch.id)
            case "give back":
                for batch in world.fetched():
                    world.report(batch, [])
            case "fail items":
                for batch in world.fetched():
                    world.report(batch, [PASSING for _ in batch.items])
            case "wait":
                world.clock.advance(random.uniform(0, 15))
            case "flush":
                world.fleet.flush()
                world.view.forget()
            case "fail fleet":
                faults.fail(f"fleet.{random.choice(fleet_calls)}")
            case "lose fleet":
                faults.lose_answer(f"fleet.{random.choice(fleet_calls)}")
            case "fail send":
                faults.fail("mailboxes.send")
            case "lose send":
                faults.lose_answer("mailboxes.send")
            case "fail log":
                faults.fail("log.complete")
            case "fail view":
                faults.fail("view.ended")
            case "crash":
                world = make_world(max_jobs=3, max_attempts=5)
        assert set(world.log.statuses()) <= set(submitted)
        assert_no_job_is_out_twice(world)
    faults.before.clear()
    faults.after.clear()

    finish(world, rounds=400)
    for _ in range(3):
        world.clock.advance(1)
        world.step()

    assert world.log.statuses().keys() == set(submitted)
    assert world.memory.held_bytes == 0
    assert world.view.statuses() == world.log.statuses()


# ── drain ────────────────────────────────────────────────────────────────────────────────────────


def test_draining_finishes_what_is_out_and_takes_nothing_new(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="out"))
    world.offer()
    world.step()
    world.submit(make_job(id="new"))
    world.offer(2)
    world.work()

    world.step(3, draining=True)

    assert world.log.statuses() == {"out": "succeeded"}
    assert len(world.leases) == 0
    assert len(world.mailboxes.sent) == 1
    assert len(offered(world)) == 2
    assert world.consumer.open == set()


def test_what_comes_back_while_draining_stays_open_for_the_next_life(
    world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    (batch,) = world.fetched()
    world.report(batch, [])

    world.step(2, draining=True)

    assert len(world.leases) == 0
    assert world.log.statuses() == {}
    assert len(world.consumer.open) == 1


def test_draining_with_jobs_that_wait_does_not_spin(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="out"))
    world.offer()
    world.step()
    world.submit(make_job(id="waits"))
    world.step()
    world.fleet.waits.clear()

    world.step(3, draining=True)

    assert all(timeout_s == IDLE_S for _, timeout_s in world.fleet.waits)


# ── a flood of dead letters ──────────────────────────────────────────────────────────────────────

BROKEN = ItemOutcome(code="step_failed", message="A step raised.")
WRONG = ItemOutcome(code="image_truncated", message="Ends too early.", invalid=True)
BREAKER = BreakerSettings(consecutive=5, cooldown_s=30)


def fail_all(world: Any, item: ItemOutcome, rounds: int = 5) -> int:
    """Workers that answer everything alike; how many jobs they were given."""
    given = 0
    for _ in range(rounds):
        world.offer()
        world.clock.advance(0.3)
        world.step(2)
        for batch in world.fetched():
            given += len(batch.items)
            world.report(batch, [item for _ in batch.items])
    world.step()
    return given


def test_a_model_that_only_makes_dead_letters_is_held_back_and_tried_now_and_then(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(max_jobs=5, breaker_settings=BREAKER)
    world.submit(*(make_job() for _ in range(50)))

    given = fail_all(world, BROKEN)

    assert given < 20
    assert len(world.log.statuses()) == given
    assert len(world.memory.open) == 50 - given
    world.clock.advance(30)
    assert fail_all(world, BROKEN) == 1


def test_a_probe_that_succeeds_lets_the_others_go(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(max_jobs=5, breaker_settings=BREAKER)
    world.submit(*(make_job() for _ in range(50)))
    fail_all(world, BROKEN)

    world.clock.advance(30)
    finish(world, rounds=100)

    statuses = list(world.log.statuses().values())
    assert len(statuses) == 50
    assert statuses.count("failed") < 20


def test_other_tenants_go_on(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(max_jobs=5, breaker_settings=BREAKER)
    world.submit(*(make_job() for _ in range(20)))
    fail_all(world, BROKEN)

    world.submit(make_job(id="other", tenant="other"))
    finish_one = fail_all(world, ItemOutcome(b"{}"), rounds=1)

    assert finish_one == 1
    assert world.log.statuses()["other"] == "succeeded"


def test_jobs_that_are_wrong_themselves_are_no_fault_of_the_model(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(max_jobs=5, breaker_settings=BREAKER)
    world.submit(*(make_job() for _ in range(50)))

    assert fail_all(world, WRONG, rounds=12) == 50
