"""What workers report, or fail to report, becomes each job's one outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from infra.eventlog import NewRecord
from schemas.batches import Completion, ItemOutcome
from schemas.jobs import Job, read_job
from schemas.payloads import Payload
from schemas.topics import RETRY
from workers.dispatcher.leases import Lease
from workers.dispatcher.settle import BLAMELESS, MAX_DISPATCHES
from workers.dispatcher.waiting import RELEASE_FIRST, WAIT_MIN_S

MakeJob = Callable[..., Job]

GOOD = ItemOutcome(b'{"type":"echo"}')
PASSING = ItemOutcome(code="device_out_of_memory", message="Away.", retry=True)
NOT_BUILT = ItemOutcome(code="engine_not_built", message="Not built yet.", retry=True)
FOR_GOOD = ItemOutcome(code="image_truncated", message="Expected a whole image.")
INVALID = ItemOutcome(code="image_truncated", message="Expected a whole image.", invalid=True)


@pytest.fixture
def run(world: Any) -> Callable[..., Lease]:
    """`run(job, ..., begin=True)`: the jobs are admitted, and out with a worker as batch `b`."""

    def start(*jobs: Job) -> Lease:
        world.submit(*jobs)
        world.intake.receive(world.clock.wall())
        batch = world.batcher.next_batch(["premium", "standard", "basic", "bulk"], 0)
        assert len(batch) == len(jobs)
        for job in batch:
            job.dispatches += 1
        world.leases.grant("b", "w", batch, world.clock.monotonic())
        lease: Lease = next(iter(world.leases))
        return lease

    return start


def settle(world: Any, *items: ItemOutcome, batch_id: str = "b") -> None:
    now = world.clock.wall()
    world.settlement.settle([Completion(batch_id, "w", list(items))], now)
    world.outcomes.commit(now)


def lose(world: Any, lease: Lease, *, begun: bool) -> None:
    now = world.clock.wall()
    world.settlement.lost(lease, begun=begun, now=now)
    world.outcomes.commit(now)


def retried(world: Any) -> list[Job]:
    return [read_job(RETRY, r.headers, r.value, 0.0) for r in world.log.records[RETRY]]


def letters(world: Any) -> dict[str, str]:
    records = world.log.records["jobs.text.standard.dlq"]
    return {record.key: record.headers["x-error"] for record in records}


def test_each_item_ends_for_itself(world: Any, run: Any, make_job: MakeJob) -> None:
    run(*(make_job(id=id_) for id_ in "abc"))

    settle(world, GOOD, FOR_GOOD, PASSING)

    assert world.log.statuses() == {"a": "succeeded", "b": "failed"}
    assert letters(world) == {"b": "image_truncated"}
    assert [job.id for job in retried(world)] == ["c"]
    assert len(world.consumer.commits) == 1
    assert world.consumer.open == set()
    assert world.memory.open == {}


def test_a_passing_failure_is_retried_until_the_attempts_are_used_up(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    run(make_job(id="a"))
    settle(world, PASSING)
    (first,) = retried(world)
    assert (first.attempt, first.suspect) == (1, False)

    for _ in range(2):
        world.clock.advance(100)
        world.intake.receive(world.clock.wall())
        world.intake.wake(world.clock.wall())
        batch = world.batcher.next_batch(["standard"], world.clock.wall())
        world.leases.grant("b", "w", batch, world.clock.monotonic())
        settle(world, PASSING)

    assert [job.attempt for job in retried(world)] == [1, 2]
    assert letters(world) == {"a": PASSING.code}
    (outcome,) = world.log.outcomes()
    assert (outcome.status, outcome.code, outcome.attempts) == ("failed", "device_out_of_memory", 3)
    (letter,) = world.log.records["jobs.text.standard.dlq"]
    assert letter.headers["x-attempt"] == "3"
    assert letter.headers["x-original-topic"] == RETRY
    assert letter.value == b"hello"


def test_a_model_that_allows_one_attempt_has_one(make_world: Any, make_job: MakeJob) -> None:
    world = make_world(max_attempts=1)
    world.submit(make_job(id="a"))
    world.intake.receive(world.clock.wall())
    batch = world.batcher.next_batch(["standard"], 0)
    world.leases.grant("b", "w", batch, 0)

    settle(world, PASSING)

    assert world.log.statuses() == {"a": "failed"}


@pytest.mark.parametrize("suspect", [False, True])
@pytest.mark.parametrize("code", sorted(BLAMELESS))
def test_what_is_no_fault_of_the_job_is_not_charged(
    make_world: Any, make_job: MakeJob, noon: float, code: str, suspect: bool
) -> None:
    """A full disk would otherwise make dead letters of good jobs within seconds, and so would an engine that is
    still being built."""
    world = make_world(max_attempts=1)
    world.submit(make_job(id="a"))
    world.intake.receive(world.clock.wall())
    (job,) = world.batcher.next_batch(["standard"], 0)
    job.job = msgspec.structs.replace(job.job, suspect=suspect)
    world.leases.grant("b", "w", [job], 0)

    settle(world, ItemOutcome(code=code, message="Not now.", retry=True))

    assert world.log.statuses() == {}
    (again,) = retried(world)
    assert (again.attempt, again.suspect, again.waits_for) == (0, suspect, code)
    assert again.not_before > noon


def test_a_job_that_waited_is_run_when_it_can_be_and_waits_for_nothing_after_a_failure(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    run(make_job(id="a"))
    settle(world, NOT_BUILT)
    for item in (PASSING, GOOD):
        world.clock.advance(WAIT_MIN_S)
        world.intake.receive(world.clock.wall())
        world.intake.wake(world.clock.wall())
        batch = world.batcher.next_batch(["standard"], world.clock.wall())
        world.leases.grant("b", "w", batch, world.clock.monotonic())
        settle(world, item)

    assert [(job.attempt, job.waits_for) for job in retried(world)] == [
        (0, "engine_not_built"),
        (1, None),
    ]
    (outcome,) = world.log.outcomes()
    assert (outcome.status, outcome.attempts) == ("succeeded", 2)


@pytest.mark.parametrize("item", [GOOD, INVALID])
def test_a_model_that_answers_again_has_its_jobs_released(
    world: Any, run: Any, make_job: MakeJob, item: ItemOutcome
) -> None:
    """If only that a job is invalid: what others wait for is there."""
    run(make_job(id="a"))
    settle(world, NOT_BUILT)
    assert world.waiting.release(0) == {}
    run(make_job(id="b"))
    settle(world, item)

    assert world.waiting.release(0) == {"echo/1": RELEASE_FIRST}


def test_jobs_whose_run_took_the_device_down_go_alone_from_then_on(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    """It may be one job's doing, and would take its neighbours with it each time."""
    run(make_job(id="a"), make_job(id="b"))
    failed = ItemOutcome(code="device_failed", message="CUDA_ERROR_ILLEGAL_ADDRESS", retry=True)

    settle(world, failed, failed)

    assert [(job.attempt, job.suspect) for job in retried(world)] == [(1, True), (1, True)]


def test_a_job_waits_until_its_deadline_and_no_longer(
    world: Any, run: Any, make_job: MakeJob, noon: float
) -> None:
    run(make_job(id="a", deadline_at=noon + 0.5))
    settle(world, NOT_BUILT)

    world.clock.advance(0.5)
    world.intake.receive(world.clock.wall())
    world.intake.wake(world.clock.wall())
    world.outcomes.commit(world.clock.wall())

    (outcome,) = world.log.outcomes()
    assert (outcome.status, outcome.attempts) == ("expired", 0)


def test_a_job_cancelled_while_it_ran_ends_as_cancelled_whatever_came_of_it(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    run(*(make_job(id=id_) for id_ in "abcd"))
    for id_ in "abc":
        world.memory.cancel(id_)

    settle(world, GOOD, FOR_GOOD, PASSING, GOOD)

    assert world.log.statuses() == dict.fromkeys("abc", "cancelled") | {"d": "succeeded"}
    assert letters(world) == {}


def test_a_job_whose_deadline_came_while_it_ran_ends_as_expired(
    world: Any, run: Any, make_job: MakeJob, noon: float
) -> None:
    run(make_job(id="a", deadline_at=noon + 5), make_job(id="b", deadline_at=noon + 50))
    world.clock.advance(5)

    settle(world, GOOD, GOOD)

    assert world.log.statuses() == {"a": "expired", "b": "succeeded"}


def test_a_deadline_that_the_worker_saw_pass_is_no_failure(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    """Its clock may be ahead of this one."""
    run(make_job(id="a"))

    settle(world, ItemOutcome(code="deadline_passed", message="The deadline passed."))

    assert world.log.statuses() == {"a": "expired"}


@pytest.mark.parametrize("known", ["other", "b"])
def test_the_report_of_a_batch_that_is_not_on_record_is_ignored(
    world: Any, run: Any, make_job: MakeJob, known: str
) -> None:
    run(make_job(id="a"))
    if known == "b":
        settle(world, GOOD)
    before = world.log.statuses()

    settle(world, FOR_GOOD, batch_id=known)

    assert world.log.statuses() == before
    assert letters(world) == {}


def test_a_batch_that_was_given_back_waits_again_uncharged(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    run(*(make_job(id=id_) for id_ in "ab"))

    settle(world)

    assert len(world.leases) == 0
    batch = world.batcher.next_batch(["standard"], 0)
    assert [(job.job.id, job.job.attempt, job.job.suspect) for job in batch] == [
        ("a", 0, False),
        ("b", 0, False),
    ]
    assert retried(world) == []


def test_a_report_with_the_wrong_number_of_items_loses_no_job_and_does_not_end_the_dispatcher(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    """A worker of another version, or a bug in one: its batch must come back, or fail, whole."""
    run(*(make_job(id=id_) for id_ in "abc"))

    settle(world, GOOD)

    kept = {job.job.id for job in world.batcher}
    assert kept | world.log.statuses().keys() | {j.id for j in retried(world)} == {"a", "b", "c"}


# ── lost ─────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_of_a_lost_batch_that_had_not_begun_just_wait_again(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    lease = run(*(make_job(id=id_) for id_ in "ab"))

    lose(world, lease, begun=False)

    assert len(world.leases) == 0
    batch = world.batcher.next_batch(["standard"], 0)
    assert [(job.job.id, job.job.attempt, job.job.suspect) for job in batch] == [
        ("a", 0, False),
        ("b", 0, False),
    ]
    assert world.consumer.commits == []
    assert world.settlement.redispatched == 2


def test_jobs_of_a_lost_batch_that_had_begun_are_suspect_and_charged_and_go_alone(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    lease = run(*(make_job(id=id_) for id_ in "ab"))

    lose(world, lease, begun=True)
    assert [(job.id, job.attempt, job.suspect) for job in retried(world)] == [
        ("a", 1, True),
        ("b", 1, True),
    ]
    world.clock.advance(100)
    world.intake.receive(world.clock.wall())

    batches = [world.batcher.next_batch(["standard"], world.clock.wall()) for _ in range(3)]
    assert sorted(tuple(job.job.id for job in batch) for batch in batches) == [(), ("a",), ("b",)]


def test_a_job_that_took_its_worker_down_each_time_is_a_dead_letter(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    job = make_job(id="a")
    lease = run(job)
    lose(world, lease, begun=True)
    for _ in range(2):
        world.clock.advance(100)
        world.intake.receive(world.clock.wall())
        batch = world.batcher.next_batch(["standard"], world.clock.wall())
        world.leases.grant("b", "w", batch, world.clock.monotonic())
        (lease,) = world.leases
        lose(world, lease, begun=True)

    assert [job.attempt for job in retried(world)] == [1, 2]
    assert letters(world) == {"a": "worker_died"}
    (outcome,) = world.log.outcomes()
    assert (outcome.status, outcome.attempts) == ("failed", 3)


def test_a_job_that_ran_alone_without_taking_its_worker_down_is_suspect_no_longer(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    lease = run(make_job(id="a"))
    lose(world, lease, begun=True)
    world.clock.advance(100)
    world.intake.receive(world.clock.wall())
    batch = world.batcher.next_batch(["standard"], world.clock.wall())
    world.leases.grant("b", "w", batch, world.clock.monotonic())

    settle(world, PASSING)

    assert [(job.attempt, job.suspect) for job in retried(world)] == [(1, True), (2, False)]


def test_a_job_that_vanishes_again_and_again_unrun_fails_in_the_end(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    lease = run(make_job(id="a"))
    for dispatch in range(1, MAX_DISPATCHES + 1):
        assert world.log.statuses() == {}
        (job,) = lease.jobs
        assert job.dispatches == dispatch
        lose(world, lease, begun=False)
        if dispatch < MAX_DISPATCHES:
            batch = world.batcher.next_batch(["standard"], 0)
            batch[0].dispatches += 1
            world.leases.grant("b", "w", batch, 0)
            (lease,) = world.leases

    assert world.log.statuses() == {"a": "failed"}
    assert world.memory.open == {}


@pytest.mark.parametrize("attempt", [0, 2])
def test_a_job_cancelled_while_it_ran_is_cancelled_though_its_worker_died(
    world: Any, run: Any, make_job: MakeJob, attempt: int
) -> None:
    lease = run(make_job(id="a"))
    lease.jobs[0].job = make_job(id="a", version=1, attempt=attempt)
    world.memory.cancel("a")

    lose(world, lease, begun=True)
    world.clock.advance(100)
    world.intake.receive(world.clock.wall())
    world.outcomes.commit(world.clock.wall())

    assert world.log.statuses() == {"a": "cancelled"}


def test_the_report_of_a_batch_that_was_lost_is_ignored(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    lease = run(make_job(id="a"))
    lose(world, lease, begun=False)

    settle(world, GOOD)

    assert world.log.statuses() == {}
    assert [job.job.id for job in world.batcher] == ["a"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_key_stays_taken_while_its_job_is_on_its_way_to_another_attempt(
    world: Any, run: Any, make_job: MakeJob, begun: bool
) -> None:
    """Otherwise other work under that key slips in, and it is the accepted job that is turned away."""
    first = make_job(id="x", key="k")
    lease = run(first)
    lose(world, lease, begun=begun)
    world.submit(make_job(id="x", key="k", params={"other": 1}))

    for _ in range(3):
        world.clock.advance(100)
        world.intake.receive(world.clock.wall())
        world.intake.wake(world.clock.wall())
        world.outcomes.commit(world.clock.wall())

    assert [job.job.params for job in world.batcher] == [{}]


def test_a_dead_letter_too_large_for_the_log_goes_without_its_value(
    world: Any, run: Any, make_job: MakeJob
) -> None:
    """And neither its job nor its neighbours in the transaction are kept from their ends."""
    small, large = (Payload("text/plain", data=b"x" * size) for size in (4500, 5000))
    run(make_job(id="a", payload=small), make_job(id="large", payload=large))
    world.log.largest_bytes = 2000

    settle(world, GOOD, FOR_GOOD)

    assert world.log.statuses() == {"a": "succeeded", "large": "failed"}
    (letter,) = world.log.records["jobs.text.standard.dlq"]
    assert letter.value == b""
    assert letter.headers["x-value-dropped"] == "5000 bytes"
    assert letter.headers["x-original-offset"] == "1"
    assert len(world.outcomes) == 0


def test_a_job_too_large_to_be_retried_fails(world: Any, run: Any, make_job: MakeJob) -> None:
    """A producer may compress; what came in then does not go out with the headers of a retry."""
    small, large = (Payload("text/plain", data=b"x" * size) for size in (4500, 5000))
    run(make_job(id="a", payload=small), make_job(id="large", payload=large))
    world.log.largest_bytes = 2000

    settle(world, GOOD, PASSING)

    outcomes = {outcome.job_id: outcome for outcome in world.log.outcomes()}
    assert outcomes["a"].status == "succeeded"
    assert (outcomes["large"].code, outcomes["large"].attempts) == ("record_too_large", 1)
    (letter,) = world.log.records["jobs.text.standard.dlq"]
    assert letter.headers["x-value-dropped"] == "5000 bytes"
    assert world.log.records.get(RETRY, []) == []
    assert len(world.outcomes) == 0


def test_of_a_record_with_large_headers_and_key_the_dead_letter_has_the_reason_alone(
    world: Any,
) -> None:
    large = "x" * 5000
    world.log.append([NewRecord("jobs.text.bulk", large, {"app": large}, b"?")])
    world.log.largest_bytes = 2000

    world.intake.receive(world.clock.wall())
    world.outcomes.commit(world.clock.wall())

    (letter,) = world.log.records["jobs.text.bulk.dlq"]
    assert letter.key == large[:256]
    assert letter.headers["x-error"] == "record_malformed"
    assert "app" not in letter.headers
    assert world.consumer.open == set()
