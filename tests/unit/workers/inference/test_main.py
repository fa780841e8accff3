"""The worker process around the task: beats, lost slots, drain, and what it does when Redis is away."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from infra.settings import load_settings
from workers.inference import main as worker_main
from workers.inference.hearing import DEAF_S, Hearing
from workers.inference.main import Worker
from workers.inference.residency import Wanted
from workers.inference.start import Steps
from workers.inference.watchdog import EXIT_OVERRUN
from workers.process import EXIT_FAILED


class Ended(BaseException):
    """Instead of the end of the process."""


@pytest.fixture
def worker(tmp_path: Any, fleet: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = load_settings(data_dir=tmp_path, worker={"name": "w", "drain_s": 0})
    worker = Worker(settings, Steps())
    worker.fleet = fleet
    worker.runner._fleet = fleet

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    yield worker
    worker._stopped.set()
    worker.runner._stages.close()


def offered(fleet: Any) -> list[Any]:
    return [token for tokens in fleet.slots.values() for token in tokens]


def test_a_beat_shows_the_worker_and_offers_its_slots(worker: Worker, fleet: Any) -> None:
    worker.beat()

    (beat,) = fleet.beats
    assert (beat.worker, beat.life, beat.slots) == ("w", worker.hand.life, 3)
    assert (beat.draining, beat.batches, beat.engines) == (False, [], [])
    assert len(offered(fleet)) == 3


def test_a_beat_renews_the_leases_of_what_is_in_hand(
    worker: Worker, fleet: Any, clock: Any, make_batch: Any
) -> None:
    batch = make_batch()
    fleet.lease(batch, "w")
    worker.hand.hold(batch, "any")

    for _ in range(10):
        clock.advance(5)
        worker.beat()

    assert fleet.leased(batch.id)
    assert fleet.beats[-1].batches == [batch.id]


def test_slots_that_redis_lost_are_offered_anew(worker: Worker, fleet: Any) -> None:
    worker.beat()
    fleet.flush()

    for _ in range(4):
        worker.beat()

    assert sorted(offered(fleet)) == sorted(worker.hand.offers())
    assert len(offered(fleet)) == 3


def test_a_drain_offers_nothing_more_and_gives_back_what_does_not_end_in_time(
    worker: Worker, fleet: Any, make_batch: Any, make_items: Any
) -> None:
    worker.beat()
    batch = make_batch(make_items("1"))
    fleet.lease(batch, "w")
    worker.hand.hold(batch, "any")
    worker.hand.close()

    with pytest.raises(Ended):
        worker.end_drain()

    assert offered(fleet) == []
    (completion,) = fleet.read_inbox()
    assert (completion.batch_id, completion.items) == (batch.id, [])


def test_a_drain_ends_without_a_word_when_all_is_done(worker: Worker, fleet: Any) -> None:
    worker.beat()
    worker.hand.close()
    worker._stopped.set()

    worker.end_drain()

    assert offered(fleet) == []


def test_a_redis_that_is_away_when_a_drain_begins_does_not_end_it_before_its_time(
    worker: Worker, fleet: Any, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ending at once would take running batches down with it, and charge their jobs."""
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return False

    monkeypatch.setattr(worker._stopped, "wait", wait)
    faults.always.add("fleet")
    worker.hand.close()

    with pytest.raises(Ended):
        worker.end_drain()

    assert waited == [worker.settings.worker.drain_s]


def test_one_batch_that_cannot_be_given_back_does_not_keep_the_others(
    worker: Worker, fleet: Any, faults: Any, make_batch: Any, make_items: Any
) -> None:
    batches = [make_batch(make_items("1")) for _ in range(3)]
    for batch in batches:
        fleet.lease(batch, "w")
        worker.hand.hold(batch, "any")
    worker.hand.close()
    faults.fail("fleet.complete")

    with pytest.raises(Ended):
        worker.end_drain()

    assert len(fleet.read_inbox()) == 2


def test_closing_signs_off(worker: Worker, fleet: Any, faults: Any) -> None:
    worker.beat()
    assert fleet.alive == {"w"}

    worker.close()

    assert fleet.alive == set()


def test_closing_while_redis_is_away_does_not_raise(worker: Worker, faults: Any) -> None:
    faults.always.add("fleet")

    worker.close()


def test_the_start_is_told_step_by_step_and_in_whole(
    worker: Worker, fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_beating", SimpleNamespace(start=lambda: None, is_alive=bool))
    monkeypatch.setattr(worker.models, "keep_current_until", lambda _: None)
    worker.models.warm_up(worker.start)
    worker.beat()
    assert fleet.beats[-1].cold_start_s == 0

    worker.on_ready()
    worker.beat()

    beat = fleet.beats[-1]
    assert list(beat.start) == ["connect", "catalogue", "listen"]
    assert beat.ready
    assert sum(beat.start.values()) == pytest.approx(beat.cold_start_s, rel=0.1)


def test_a_worker_asks_for_work_only_when_its_models_are_warm(
    worker: Worker, fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, bool]] = []

    def note(what: str) -> None:
        told.append((what, len(offered(fleet)), worker.health.ready))

    def start() -> None:
        note("listening")
        worker.on_ready()
        worker.beat()
        note("ready")

    monkeypatch.setattr(worker.models, "warm_up", lambda _: note("warming"))
    monkeypatch.setattr(worker.models, "keep_current_until", lambda _: None)
    monkeypatch.setattr(worker.watchdog, "look_until", lambda _: None)
    celery = SimpleNamespace(start=start)
    app: Any = SimpleNamespace(Worker=lambda **_: celery)
    monkeypatch.setattr(worker_main, "make_app", lambda _: app)
    monkeypatch.setattr(worker.runner, "register", lambda _: None)

    worker.run()

    assert told == [("warming", 0, False), ("listening", 0, False), ("ready", 3, True)]


def test_a_worker_whose_device_failed_asks_for_no_more_and_ends_as_failed(
    worker: Worker, fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.beat()
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *sent: signals.append(sent))

    for _ in range(2):  # in several batches at once
        worker.runner._on_device_failed()

    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert worker.hand.closed
    with pytest.raises(Ended) as ended:
        worker.end_drain()
    assert ended.value.args == (EXIT_FAILED,)


def test_a_load_that_hangs_is_charged_to_its_jobs_and_no_others_and_ends_the_worker(
    worker: Worker, fleet: Any, make_batch: Any, make_items: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[tuple[int, int]] = []

    def kill(*sent: int) -> None:
        signals.append(sent)
        worker.health.ready = False  # as Celery does by way of on_drain

    monkeypatch.setattr(os, "kill", kill)
    worker.health.ready = True
    stuck, other, running = (make_batch(make_items(name)) for name in ("1", "2", "3"))
    other = msgspec.structs.replace(other, model="other")
    for batch in (stuck, other, running):
        fleet.lease(batch, "w")
        worker.hand.hold(batch, "any")
    worker.hand.held()[2].began_at = 1.0

    for _ in range(2):  # as often as the watchdog looks
        worker.on_load_overran(f"{stuck.model}/{stuck.version}")

    (completion,) = fleet.read_inbox()
    assert completion.batch_id == stuck.id
    assert [(item.code, item.retry) for item in completion.items] == [("load_overran", True)]
    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert worker.hand.closed
    assert worker.exit_code == EXIT_OVERRUN
    assert [held.batch.id for held in worker.hand.held()] == [other.id, running.id]


def test_a_load_that_hangs_at_the_start_ends_the_worker_at_once(worker: Worker) -> None:
    with pytest.raises(Ended) as ended:
        worker.on_load_overran("echo/1")
    assert ended.value.args == (EXIT_OVERRUN,)


def test_after_a_device_that_failed_nothing_is_asked_of_it_any_more(
    worker: Worker, fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not even answer, and the process ends anyway."""
    closed: list[str] = []
    engine: Any = SimpleNamespace(memory_bytes=1, close=lambda: closed.append("the engine"))
    wanted = Wanted(1, False, lambda _: engine)
    monkeypatch.setattr(worker.models.resident, "_want", lambda *_: wanted)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with worker.models.resident.use("echo", 1):
        pass
    worker.beat()
    worker.on_device_failed()

    worker.close()

    assert closed == []
    assert fleet.alive == set()


def test_a_mailbox_that_is_not_heard_any_more_is_connected_anew(
    worker: Worker, fleet: Any, clock: Any, make_batch: Any
) -> None:
    called: list[Any] = []
    worker.celery = SimpleNamespace(
        consumer=SimpleNamespace(hub=SimpleNamespace(call_soon=called.append))
    )
    worker.hearing = Hearing(clock.monotonic)
    fleet.mail = 2

    worker.beat()
    clock.advance(DEAF_S)
    worker.runner.taken += 1
    worker.beat()
    assert called == []

    clock.advance(DEAF_S)
    worker.beat()
    worker.beat()

    (lose,) = called
    with pytest.raises(ConnectionResetError):
        lose()


def test_a_worker_with_its_hands_full_may_leave_its_mail_unread(
    worker: Worker, fleet: Any, clock: Any, make_batch: Any
) -> None:
    worker.hearing = Hearing(clock.monotonic)
    fleet.mail = 1
    for _ in range(worker.hand.capacity):
        worker.hand.hold(make_batch(), "any")

    for _ in range(3):
        clock.advance(DEAF_S)
        worker.beat()
