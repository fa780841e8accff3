"""The process around the loop: trouble, sign of life, drain, and what it knows after a restart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import workers.process
from infra.eventlog import Fenced, NewRecord
from infra.health import Health
from infra.settings import BreakerSettings, load_settings
from schemas.errors import Transient
from schemas.jobs import Job
from schemas.topics import CONTROL, KEYS, TOPIC_BY_NAME
from workers.dispatcher import main as dispatcher_main
from workers.dispatcher.breaker import Breaker
from workers.dispatcher.main import Process, recall_cancels
from workers.dispatcher.memory import JobMemory
from workers.process import EXIT_FENCED

MakeJob = Callable[..., Job]
KEYS_WINDOW_S = 24 * 3600.0


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch, clock: Any) -> list[float]:
    """The process sleeps and tells time by the test's clock."""
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        clock.advance(seconds)

    time = SimpleNamespace(sleep=sleep, time=clock.wall, monotonic=clock.monotonic)
    monkeypatch.setattr(dispatcher_main, "time", time)
    monkeypatch.setattr(workers.process, "time", time)
    return sleeps


@pytest.fixture
def process(world: Any, log: Any, fleet: Any, tmp_path: Any, sleeps: list[float]) -> Process:
    """A process around the parts of the test's world, without the connections it would open."""
    process = Process.__new__(Process)
    process.breaker, process.health = Breaker(BreakerSettings()), Health()
    process.settings = load_settings(data_dir=tmp_path)
    process.log = log
    process.fleet = fleet
    for part in (
        "memory", "consumer", "batcher", "leases", "outcomes", "settlement", "intake", "dispatcher",
        "view_writer",
    ):  # fmt: skip
        setattr(process, part, getattr(world, part))
    process.janitor = SimpleNamespace(run=lambda stop: None)  # type: ignore[assignment]
    process.started_at = 0.0
    process._beat_at = 0.0
    fleet.shown = []
    fleet.show_dispatcher = fleet.shown.append
    fleet.sign_off_dispatcher = lambda slot: None
    process.control = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]
    return process


def stopping_after(process: Process, steps: int) -> threading.Event:
    """An event that is set once the loop has made so many steps."""
    stop = threading.Event()
    left = [steps]
    step = process.dispatcher.step

    def counted(*, draining: bool = False) -> None:
        left[0] -= 1
        if left[0] <= 0:
            stop.set()
        step(draining=draining)

    process.dispatcher.step = counted  # type: ignore[method-assign]
    return stop


def test_trouble_is_waited_through_and_its_end_noted(
    process: Process, faults: Any, sleeps: list[float]
) -> None:
    faults.always.add("fleet")
    for _ in range(3):
        process.guarded_step(draining=False)
    assert process.trouble == "fleet.wait_down"
    assert len(sleeps) == 3

    faults.always.clear()
    process.guarded_step(draining=False)

    assert process.trouble is None
    assert len(sleeps) == 3


def test_a_bug_is_not_taken_for_trouble(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(process.dispatcher, "step", broken)

    with pytest.raises(ZeroDivisionError):
        process.guarded_step(draining=False)


def test_a_dispatcher_that_another_took_over_from_ends_and_says_so(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fenced(**_: object) -> None:
        raise Fenced

    monkeypatch.setattr(process.dispatcher, "step", fenced)

    assert process.run(threading.Event()) == EXIT_FENCED


def test_a_stopped_dispatcher_finishes_what_is_out(
    process: Process, world: Any, make_job: MakeJob
) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    world.work()
    stop = threading.Event()
    stop.set()

    assert process.run(stop) == 0

    assert world.log.statuses() == {"a": "succeeded"}


def test_a_stopped_dispatcher_does_not_wait_for_ever(
    process: Process, world: Any, make_job: MakeJob, clock: Any
) -> None:
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    stop = threading.Event()
    stop.set()
    wait = world.fleet.wait

    def passing(slot: int, seats: Any, timeout_s: float) -> Any:
        clock.advance(timeout_s)
        (batch_id,) = world.fleet.leases
        world.fleet.leases[batch_id] = clock.monotonic() + 10
        return wait(slot, seats, timeout_s)

    world.fleet.wait = passing

    assert process.run(stop) == 0
    assert world.log.statuses() == {}
    assert len(world.consumer.open) == 1


def test_a_stopped_dispatcher_writes_what_it_has_settled_though_the_log_is_busy(
    process: Process, world: Any, make_job: MakeJob, faults: Any
) -> None:
    """Otherwise the next life runs those jobs again."""
    world.submit(make_job(id="a"))
    world.offer()
    world.step()
    world.work()
    faults.fail("log.complete", times=2)
    stop = threading.Event()
    stop.set()

    assert process.run(stop) == 0

    assert world.log.statuses() == {"a": "succeeded"}


def test_a_running_dispatcher_shows_how_it_stands_about_once_a_second(
    process: Process, world: Any, make_job: MakeJob, clock: Any, fleet: Any
) -> None:
    world.submit(
        make_job(submitted_at=clock.wall() - 5), make_job(), make_job(lane="bulk"),
    )  # fmt: skip
    stop = stopping_after(process, 10)
    wait = fleet.wait

    def passing(slot: int, seats: Any, timeout_s: float) -> Any:
        clock.advance(0.25)
        return wait(slot, seats, timeout_s)

    fleet.wait = passing
    process.run(stop)

    assert 2 <= len(fleet.shown) <= 4
    shown = fleet.shown[-1]
    assert {lane: at.waiting for lane, at in shown.waiting.items()} == {"standard": 2, "bulk": 1}
    assert 5 <= shown.waiting["standard"].oldest_s <= 10
    assert shown.models == {"echo/1": 3}
    assert (shown.running, shown.running_jobs, shown.delayed, shown.trouble) == (0, 0, 0, None)


# ── after a restart ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def memory() -> JobMemory:
    return JobMemory(KEYS_WINDOW_S, 1000)


def test_keys_that_were_answered_are_known_again(
    make_world: Any, make_job: MakeJob, log: Any, clock: Any
) -> None:
    first = make_world()
    job = make_job(key="k")
    first.submit(job)
    first.offer()
    first.step()
    first.work()
    first.step()
    clock.advance(3600)

    second = make_world()
    second.step()

    (record,) = log.records[KEYS]
    known = msgspec.structs.replace(job, id=record.key)
    assert second.memory.known_as(known, clock.wall()) == job.fingerprint
    clock.advance(KEYS_WINDOW_S - 3600 + 1)
    assert second.memory.known_as(known, clock.wall()) is None


def test_cancel_requests_are_known_again(
    world: Any, log: Any, memory: JobMemory, clock: Any, sleeps: list[float]
) -> None:
    world.cancel("old")
    clock.advance(TOPIC_BY_NAME[CONTROL].retention_s)
    world.cancel("new")
    clock.advance(1)

    recall_cancels(memory, log)

    assert memory.is_cancelled("new")
    assert not memory.is_cancelled("old")


def test_what_is_no_cancel_request_is_not_recalled_as_one(
    log: Any, memory: JobMemory, sleeps: list[float]
) -> None:
    log.append([NewRecord(CONTROL, "a", {"ce_type": "io.headrace.retrain.v1"}, b"")])

    recall_cancels(memory, log)

    assert not memory.is_cancelled("a")


def test_what_another_dispatcher_answered_until_it_was_fenced_is_known(
    monkeypatch: pytest.MonkeyPatch, log: Any, tmp_path: Any, fleet: Any, mailboxes: Any
) -> None:
    """Joining the group fences the one before; only then is what it wrote complete."""
    order: list[str] = []

    def noted(word: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*given: Any, **options: Any) -> Any:
            order.append(word)
            return call(*given, **options)

        return note

    monkeypatch.setattr(log, "consumer", noted("join", log.consumer))
    monkeypatch.setattr(log, "read", noted("recall", log.read))
    monkeypatch.setattr(dispatcher_main, "Mailboxes", lambda app: mailboxes)

    process = Process(load_settings(data_dir=tmp_path), log)
    process.fleet = fleet
    process.intake._ownership._fleet = fleet
    process.intake.receive(0)

    assert order == ["recall", "join", "recall"]


def test_a_job_that_was_open_is_run_once_more_and_answered_once(
    make_world: Any, make_job: MakeJob, log: Any, fleet: Any
) -> None:
    """A dispatcher that was killed: the next one reads on from what was committed."""
    first = make_world()
    first.submit(make_job(id="a"), make_job(id="b"))
    first.offer()
    first.step()
    (batch,) = first.fetched()
    second = make_world()
    first.report(batch)
    for _ in range(3):
        second.offer()
        second.step()
        second.work()
    second.step()

    assert log.statuses() == {"a": "succeeded", "b": "succeeded"}


def test_trouble_on_the_way_to_redis_does_not_stop_the_sign_of_life_for_good(
    process: Process, fleet: Any, clock: Any
) -> None:
    def away(beat: object) -> None:
        raise Transient("redis_unavailable", "away")

    show = fleet.show_dispatcher
    fleet.show_dispatcher = away
    process.housekeep()
    fleet.show_dispatcher = show
    clock.advance(1.5)
    process.housekeep()

    assert len(fleet.shown) == 1
