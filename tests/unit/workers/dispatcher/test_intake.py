"""The way in: every record that is received becomes an open job or is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from infra.eventlog import NewRecord, Position
from schemas.errors import Transient
from schemas.jobs import Job, cancel_headers, job_headers, job_value, retry_headers
from schemas.payloads import Payload
from schemas.topics import CONTROL, LANES, RETRY
from workers.dispatcher.memory import JobMemory

MakeJob = Callable[..., Job]

KIB = Payload("text/plain", data=b"x" * 1024)


def take(world: Any, seconds: float = 0.0) -> None:
    """One round of what the dispatcher's step does of this."""
    world.clock.advance(seconds)
    now = world.clock.wall()
    world.intake.receive(now)
    world.intake.wake(now)
    world.intake.expire(now)
    world.outcomes.commit(now)


def waiting(world: Any) -> set[str]:
    return {job.job.id for job in world.batcher}


def retry(world: Any, job: Job) -> None:
    world.log.append([NewRecord(RETRY, job.id, retry_headers(job), job_value(job))])


def test_a_good_job_is_held_and_waits(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a", lane="basic", payload=KIB))

    take(world)

    assert waiting(world) == {"a"}
    assert world.memory.open.keys() == {"a"}
    assert world.memory.held_bytes == 1024
    assert world.consumer.open == {Position("jobs.text.basic", 0, 0)}


@pytest.mark.parametrize("topic", ["jobs.text.standard", "jobs.image.bulk", RETRY, CONTROL])
def test_a_malformed_record_is_a_dead_letter_and_its_position_is_complete(
    world: Any, make_job: MakeJob, topic: str
) -> None:
    world.log.append([NewRecord(topic, "k", {"ce_type": "nonsense"}, b"\xff")])
    world.submit(make_job(id="good"))

    take(world)

    (letter,) = world.log.records[f"{topic}.dlq"]
    assert (letter.key, letter.value) == ("k", b"\xff")
    assert letter.headers["x-error"] == "record_malformed"
    assert letter.headers["x-original-topic"] == topic
    assert Position(topic, 0, 0) in world.consumer.completed
    assert world.log.statuses() == {}
    assert waiting(world) == {"good"}


@pytest.mark.parametrize(
    "headers",
    [
        {"ce_deadline": "9999-12-31T23:59:59.999999Z"},
        {"ce_time": "0001-01-01T00:00:00+23:59"},
        {"ce_traceparent": "garbage"},
        {"ce_modelversion": "999999999999999"},
        {"ce_model": "\U0001f600" * 1000},
        {"ce_idempotencykey": ""},
        {"ce_replyto": "\n"},
        {"content-type": ""},
        {"ce_params": '{"n": 1e308}'},
    ],
)
def test_no_record_of_a_stranger_stops_the_dispatcher(
    world: Any, make_job: MakeJob, headers: dict[str, str]
) -> None:
    good, bad = make_job(id="good"), make_job(id="bad")
    world.log.append([NewRecord(bad.topic, "bad", job_headers(bad) | headers, b"hello")])
    world.submit(good)
    world.offer(4)

    world.step(3)
    world.work()
    world.step()

    assert world.log.statuses()["good"] == "succeeded"
    assert world.consumer.open == set()


def test_a_job_that_cannot_run_fails_at_once_with_a_dead_letter(
    world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(id="a", model="unknown"))

    take(world)

    (outcome,) = world.log.outcomes()
    assert (outcome.status, outcome.code) == ("failed", "model_unknown")
    assert len(world.log.records["jobs.text.standard.dlq"]) == 1
    assert world.consumer.open == set()
    assert world.memory.open == {}


def test_a_job_that_comes_too_late_is_expired(world: Any, make_job: MakeJob, noon: float) -> None:
    world.submit(make_job(id="a", deadline_at=noon - 1))

    take(world)

    assert world.log.statuses() == {"a": "expired"}


def test_a_job_that_waits_past_its_deadline_is_expired(
    world: Any, make_job: MakeJob, noon: float
) -> None:
    world.submit(make_job(id="a", deadline_at=noon + 5))
    take(world)

    take(world, 5)

    assert world.log.statuses() == {"a": "expired"}
    assert waiting(world) == set()


# ── idempotency ──────────────────────────────────────────────────────────────────────────────────


def test_the_same_job_twice_is_one(world: Any, make_job: MakeJob) -> None:
    job = make_job(id="x", key="k")
    world.submit(job, job)

    take(world)

    assert len(waiting(world)) == 1
    assert world.consumer.completed == [Position(job.topic, 0, 1)]
    assert world.memory.held_bytes == 5


def test_other_work_under_a_key_is_turned_away_and_the_first_goes_on(
    world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(key="k"), make_job(key="k", params={"a": 1}))

    take(world)

    (job,) = world.batcher
    assert job.job.params == {}
    (letter,) = world.log.records["jobs.text.standard.dlq"]
    assert letter.headers["x-error"] == "idempotency_conflict"
    assert world.log.statuses() == {}


# ── cancel ───────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_waits_is_cancelled(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a"), make_job(id="b"))
    take(world)
    world.cancel("a")

    take(world)

    assert world.log.statuses() == {"a": "cancelled"}
    assert waiting(world) == {"b"}
    assert Position(CONTROL, 0, 0) in world.consumer.completed


def test_a_job_that_is_cancelled_before_it_comes_does_not_run(
    world: Any, make_job: MakeJob
) -> None:
    world.cancel("a")
    take(world)
    world.submit(make_job(id="a"))

    take(world)

    assert world.log.statuses() == {"a": "cancelled"}


def test_cancelling_what_is_not_there_does_nothing(world: Any) -> None:
    world.cancel("nobody")

    take(world)

    assert world.log.statuses() == {}
    assert world.consumer.open == set()


def test_cancelling_twice_ends_a_job_once(world: Any, make_job: MakeJob) -> None:
    world.submit(make_job(id="a"))
    take(world)
    world.cancel("a")
    world.cancel("a")

    take(world)

    assert world.log.statuses() == {"a": "cancelled"}


def test_a_control_record_of_another_kind_cancels_nothing(world: Any, make_job: MakeJob) -> None:
    """`control` will carry more than cancel requests; a dispatcher must pass over what it does not know."""
    world.submit(make_job(id="a"))
    take(world)
    headers = cancel_headers("default", "a") | {"ce_type": "io.headrace.retrain.v1"}
    world.log.append([NewRecord(CONTROL, "a", headers, b"")])

    take(world)

    assert waiting(world) == {"a"}
    assert Position(CONTROL, 0, 0) in world.consumer.completed


# ── retries ──────────────────────────────────────────────────────────────────────────────────────


def test_a_retry_goes_on_at_its_time(world: Any, make_job: MakeJob, noon: float) -> None:
    retry(world, make_job(id="a", attempt=1, not_before=noon + 30))
    take(world)
    assert (waiting(world), world.intake.delayed) == (set(), 1)
    assert world.intake.next_wake() == noon + 30

    take(world, 29)
    assert waiting(world) == set()
    take(world, 1)

    assert (waiting(world), world.intake.delayed) == ({"a"}, 0)
    assert world.intake.next_wake() is None


def test_retries_go_on_in_the_order_of_their_times(
    world: Any, make_job: MakeJob, noon: float
) -> None:
    for wait_s in (30, 10, 20):
        retry(world, make_job(id=str(wait_s), attempt=1, not_before=noon + wait_s))
    take(world)

    seen = []
    for _ in range(3):
        take(world, 10)
        seen.append(waiting(world))

    assert seen == [{"10"}, {"10", "20"}, {"10", "20", "30"}]


def test_what_waits_for_what_a_model_needs_goes_on_when_that_model_answers(
    world: Any, make_job: MakeJob, make_card: Any, noon: float
) -> None:
    """And nothing else does: a retry has a time of its own."""
    world.models.add(make_card(name="other"))
    later = {"not_before": noon + 30}
    retry(world, make_job(id="built", waits_for="engine_not_built", **later))
    retry(world, make_job(id="other", model="other", waits_for="engine_not_built", **later))
    retry(world, make_job(id="failed", attempt=1, **later))
    take(world)

    world.waiting.answered("echo/1")
    world.intake.release(noon)

    assert waiting(world) == {"built"}
    take(world, 30)
    assert waiting(world) == {"built", "other", "failed"}
    assert world.intake.delayed == 0


def test_a_retry_keeps_the_lane_it_came_on(world: Any, make_job: MakeJob) -> None:
    retry(world, make_job(id="a", lane="bulk", attempt=1))

    take(world)

    assert [job.lane for job in world.batcher] == ["bulk"]


def test_a_delayed_job_that_is_cancelled_does_not_run(
    world: Any, make_job: MakeJob, noon: float
) -> None:
    retry(world, make_job(id="a", attempt=1, not_before=noon + 30))
    take(world)
    world.cancel("a")

    take(world)
    take(world, 30)

    assert world.log.statuses() == {"a": "cancelled"}
    assert waiting(world) == set()


def test_a_delayed_job_expires_at_its_deadline_not_at_its_time(
    world: Any, make_job: MakeJob, noon: float
) -> None:
    retry(world, make_job(id="a", attempt=1, not_before=noon + 60, deadline_at=noon + 5))
    take(world)

    take(world, 6)

    assert world.log.statuses() == {"a": "expired"}


# ── room ─────────────────────────────────────────────────────────────────────────────────────────


def test_never_more_bytes_than_the_window_are_asked_for(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(window_bytes=4096)
    world.submit(*(make_job(payload=KIB) for _ in range(10)))
    for _ in range(5):
        take(world)

    assert world.memory.held_bytes == 4096
    assert world.consumer.asked_bytes == [4096]


def test_when_jobs_end_there_is_room_for_others(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(window_bytes=4096, max_jobs=2)
    world.submit(*(make_job(payload=KIB) for _ in range(10)))
    for _ in range(10):
        world.offer(1)
        world.step()
        world.work()
        world.step()

    assert set(world.log.statuses().values()) == {"succeeded"}
    assert len(world.log.statuses()) == 10
    assert world.memory.held_bytes == 0


def test_a_job_larger_than_the_window_still_comes_in(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(window_bytes=512)
    world.submit(make_job(id="a", payload=KIB))

    take(world)

    assert waiting(world) == {"a"}


def test_bulk_is_held_back_at_half_of_the_window_and_let_on_at_a_quarter(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(window_bytes=8 * 1024)
    bulk = {topic for topic in world.consumer._topics if topic.endswith(".bulk")}
    world.submit(*(make_job(id=str(i), lane="bulk", payload=KIB) for i in range(5)))
    take(world)
    assert world.consumer.paused == set()

    take(world)
    assert world.consumer.paused == bulk
    world.submit(make_job(id="b", lane="bulk"), make_job(id="live", lane="basic"))
    take(world)
    assert "live" in waiting(world)
    assert "b" not in waiting(world)

    world.cancel("0")
    world.cancel("1")
    for _ in range(2):
        take(world)
        assert world.consumer.paused == bulk
    world.cancel("2")
    world.cancel("3")
    for _ in range(2):
        take(world)
    assert world.consumer.paused == set()
    assert "b" in waiting(world)


def test_a_flood_of_bulk_leaves_room_for_every_live_lane(
    make_world: Any, make_job: MakeJob
) -> None:
    world = make_world(window_bytes=64 * 1024, window=32)
    world.submit(*(make_job(lane="bulk", payload=KIB) for _ in range(200)))
    for _ in range(5):
        take(world)
    world.submit(*(make_job(id=lane, lane=lane, payload=KIB) for lane in LANES[:3]))

    take(world)

    assert waiting(world) >= set(LANES[:3])


# ── trouble ──────────────────────────────────────────────────────────────────────────────────────


def test_when_a_model_cannot_be_looked_up_the_records_wait_and_none_is_lost(
    world: Any, make_job: MakeJob
) -> None:
    world.models.unreachable.add("far")
    world.submit(make_job(id="a"), make_job(id="b", model="far"), make_job(id="c"))
    for _ in range(3):
        with pytest.raises(Transient):
            take(world)

    world.models.unreachable.clear()
    take(world)

    assert waiting(world) == {"a", "c"}
    assert world.log.statuses() == {"b": "failed"}
    assert len(world.consumer.completed) == 1


def test_while_records_wait_to_be_taken_in_no_more_are_asked_for(
    make_world: Any, make_job: MakeJob
) -> None:
    """Otherwise a store that is away for a minute fills the memory with all that was submitted."""
    world = make_world(window_bytes=4096)
    world.models.unreachable.add("echo")
    world.submit(*(make_job(payload=KIB) for _ in range(100)))
    for _ in range(20):
        with pytest.raises(Transient):
            take(world)

    assert len(world.consumer.open) <= 4


def test_a_job_of_a_model_that_cannot_be_looked_up_does_not_hold_up_the_others(
    world: Any, make_job: MakeJob
) -> None:
    """Models that are known go on being served while the store is away."""
    world.models.unreachable.add("far")
    world.submit(make_job(id="b", model="far"), make_job(id="a"))
    for _ in range(3):
        try:
            take(world)
        except Transient:
            continue

    assert waiting(world) == {"a"}


def test_the_memory_of_jobs_is_empty_when_all_have_ended(
    make_world: Any, make_job: MakeJob, noon: float
) -> None:
    world = make_world(max_jobs=32)
    for round_ in range(20):
        world.submit(*(make_job(id=f"{round_}-{i}") for i in range(10)))
        world.offer(3)
        world.cancel(f"{round_}-0")
        world.step(2)
        world.work()
        world.step(2)

    memory: JobMemory = world.memory
    assert (memory.open, memory.held_bytes, len(world.batcher)) == ({}, 0, 0)
    assert len(world.leases) == len(world.outcomes) == 0
    assert len(world.log.statuses()) == 200
