"""The worker process around the task: beats, lost slots, drain, and what it does when Redis is away."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.settings import load_settings
from pipelines.bundle import Bundle
from pipelines.load import load_model
from schemas.errors import DEVICE_FAILED, InvalidJob, InvalidModel, Transient
from workers.inference import main as worker_main
from workers.inference import start
from workers.inference.hearing import DEAF_S, Hearing
from workers.inference.main import Worker
from workers.inference.start import Steps
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


def test_a_model_that_does_not_warm_up_is_closed_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines would stay in memory, uncounted, and more with each batch that asks for it."""
    closed: list[bool] = []

    def warm(_: Any) -> None:
        raise InvalidModel("model_check_failed", "No.")

    model = SimpleNamespace(warm=warm, close=lambda: closed.append(True), memory_bytes=1)
    card = SimpleNamespace(name="echo", version=1)
    catalogue: Any = SimpleNamespace(resolve=lambda *_: card, folder=lambda _: "")
    monkeypatch.setattr(worker, "catalogue", catalogue)
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: None)
    monkeypatch.setattr(worker_main, "load_model", lambda *_, **__: model)

    with pytest.raises(InvalidModel):
        worker.load("echo", 1)

    assert closed == [True]


def test_a_model_that_does_not_load_keeps_no_other_from_being_warmed_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, version: int) -> Any:
        if name == "bad":
            raise Transient("storage_unavailable", "away")
        loaded.append(name)
        return SimpleNamespace(memory_bytes=1, premium=False, close=lambda: None)

    cards = [SimpleNamespace(name=name, version=1) for name in ("bad", "good")]
    catalogue: Any = SimpleNamespace(
        cards=lambda: cards, resolve=lambda name, _: SimpleNamespace(name=name, version=1)
    )
    monkeypatch.setattr(worker, "catalogue", catalogue)
    monkeypatch.setattr(worker.residency, "_load", load)

    worker.warm_up()

    assert loaded == ["good"]
    assert worker.residency.names() == ["good/1"]
    assert list(worker.start.seconds) == ["connect", "catalogue", "bad not loaded"]


@pytest.fixture
def installed(
    worker: Worker, make_tensor_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The name of a model that is in the catalogue, its engine compiled when it was added."""
    folder = make_tensor_bundle("tiny", more="batch: {max_jobs: 4, buckets: [1, 4]}")
    load_model(Bundle.open(folder), worker.cache, budget_bytes=2**30).close()
    card = SimpleNamespace(name="tiny", version=1)
    catalogue: Any = SimpleNamespace(
        cards=lambda: [card], resolve=lambda *_: card, folder=lambda _: folder
    )
    monkeypatch.setattr(worker, "catalogue", catalogue)
    return "tiny"


LOAD_STEPS = (
    "fetch", "main backend", "main artefact (local)", "main load", "prepare", "warm 1", "warm 4",
)  # fmt: skip


def test_the_start_is_told_step_by_step_and_in_whole(
    worker: Worker, fleet: Any, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_beating", SimpleNamespace(start=lambda: None, is_alive=bool))
    monkeypatch.setattr(worker, "keep_current_forever", lambda: None)
    worker.warm_up()
    worker.beat()
    assert fleet.beats[-1].cold_start_s == 0

    worker.on_ready()
    worker.beat()

    beat = fleet.beats[-1]
    assert list(beat.start) == [
        "connect", "catalogue", *(f"{installed}/1 {step}" for step in LOAD_STEPS), "listen",
    ]  # fmt: skip
    assert beat.ready
    assert sum(beat.start.values()) == pytest.approx(beat.cold_start_s, rel=0.1)


def test_a_model_that_is_loaded_later_is_no_part_of_the_start_and_logged_alike(
    worker: Worker, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.cold_start_s = 1.0
    started = dict(worker.start.seconds)
    logged: list[Any] = []
    log = SimpleNamespace(info=lambda event, **facts: logged.append((event, facts.get("step"))))
    monkeypatch.setattr(start, "logger", log)

    with worker.residency.use(installed, 1):
        pass

    assert worker.start.seconds == started
    assert logged == [("step", step) for step in LOAD_STEPS]


def test_a_device_that_fails_while_warming_up_ends_the_start(
    worker: Worker, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, version: int) -> Any:
        raise Transient(DEVICE_FAILED, "Expected CUDA's cuInit to succeed.")

    monkeypatch.setattr(worker.residency, "_load", load)

    with pytest.raises(Transient, match="cuInit"):
        worker.warm_up()


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


def test_a_device_that_fails_under_a_newer_version_ends_the_worker_too(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next batch would be charged for it."""

    def load(name: str, version: int) -> Any:
        if version == 2:
            raise Transient(DEVICE_FAILED, "Expected CUDA's cuMemAlloc to succeed.")
        return SimpleNamespace(memory_bytes=1, premium=False, close=lambda: None)

    catalogue: Any = SimpleNamespace(resolve=lambda name, _: SimpleNamespace(name=name, version=2))
    monkeypatch.setattr(worker, "catalogue", catalogue)
    monkeypatch.setattr(worker.residency, "_load", load)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with worker.residency.use("echo", 1):
        pass

    worker.keep_current()

    assert worker.hand.closed
    assert worker.exit_code == EXIT_FAILED


def test_after_a_device_that_failed_nothing_is_asked_of_it_any_more(
    worker: Worker, fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not even answer, and the process ends anyway."""
    closed: list[str] = []
    engine = SimpleNamespace(
        memory_bytes=1, premium=False, close=lambda: closed.append("the engine")
    )
    monkeypatch.setattr(worker.residency, "_load", lambda *_: engine)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with worker.residency.use("echo", 1):
        pass
    worker.beat()
    worker.on_device_failed()

    worker.close()

    assert closed == []
    assert fleet.alive == set()


def test_what_could_not_be_loaded_at_the_start_is_loaded_as_soon_as_it_can_be(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine may just be being built."""
    built: set[str] = set()

    def load(name: str, version: int) -> Any:
        if name not in built:
            raise Transient("engine_not_built", "Nobody has built it yet.")
        return SimpleNamespace(memory_bytes=1, premium=False, close=lambda: None)

    card = SimpleNamespace(name="echo", version=1)
    catalogue: Any = SimpleNamespace(cards=lambda: [card], resolve=lambda *_: card)
    monkeypatch.setattr(worker, "catalogue", catalogue)
    monkeypatch.setattr(worker.residency, "_load", load)
    worker.warm_up()

    worker.keep_current()
    assert worker.residency.names() == []
    built.add("echo")
    worker.keep_current()

    assert worker.residency.names() == ["echo/1"]
    assert worker._not_loaded == set()  # or what had to make room would come back at once


def test_a_newer_version_is_loaded_beside_the_one_in_use_before_jobs_want_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = {"steady": 1, "new": 2, "broken": 2}
    tried: list[str] = []

    def load(name: str, version: int) -> Any:
        tried.append(f"{name}/{version}")
        if tried[-1] == "broken/2":
            raise InvalidModel("model_check_failed", "It does not answer.")
        return SimpleNamespace(memory_bytes=1, premium=False, close=lambda: None)

    def resolve(name: str, _: object) -> Any:
        if name == "removed":
            raise InvalidJob("model_unknown", "It is gone.")
        return SimpleNamespace(name=name, version=newest[name])

    monkeypatch.setattr(worker, "catalogue", SimpleNamespace(resolve=resolve))
    monkeypatch.setattr(worker.residency, "_load", load)
    for name in ("broken", "new", "removed", "steady"):
        with worker.residency.use(name, 1):
            pass
    tried.clear()

    for _ in range(2):
        worker.keep_current()

    assert tried == ["broken/2", "new/2"]
    assert set(worker.residency.names()) == {
        "broken/1", "new/1", "new/2", "removed/1", "steady/1",
    }  # fmt: skip


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
