"""The task: a batch is fetched, run and reported under its lease, and its slot is offered again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from infra.fleet import SlotToken
from pipelines.engines.engine import DeviceOutOfMemory
from schemas.batches import RUN_BATCH, Batch, BatchItem, ItemOutcome
from schemas.errors import DEVICE_FAILED, InferenceFailed, InvalidModel, PipelineError, Transient
from workers.inference.hand import Hand
from workers.inference.stages import failed
from workers.inference.task import REPORT_TRIES, BatchRunner

MakeItems = Callable[..., list[BatchItem]]
Soon = Callable[[threading.Event], None]


class FakeStages:
    """Answers every item. ran: the batches; during: called while one is run."""

    def __init__(self) -> None:
        self.ran: list[Batch] = []
        self.during: Callable[[Batch], None] = lambda batch: None
        self.answers: list[ItemOutcome] | None = None

    def run(self, batch: Batch, model: Any) -> list[ItemOutcome]:
        self.ran.append(batch)
        self.during(batch)
        return self.answers or [ItemOutcome(b"{}") for _ in batch.items]


class FakeResidency:
    def __init__(self) -> None:
        self.failure: Exception | None = None

    @contextmanager
    def use(self, name: str, version: int) -> Iterator[str]:
        if self.failure:
            raise self.failure
        yield f"{name}/{version}"


@pytest.fixture
def hand() -> Hand:
    return Hand("w", slots=2)


@pytest.fixture
def stages() -> FakeStages:
    return FakeStages()


@pytest.fixture
def residency() -> FakeResidency:
    return FakeResidency()


@pytest.fixture
def sleeps() -> list[float]:
    return []


@pytest.fixture
def given_up() -> list[int]:
    """How many reports were in when the device was given up."""
    return []


@pytest.fixture
def runner(
    fleet: Any, hand: Hand, residency: Any, stages: Any, sleeps: list[float], given_up: list[int]
) -> BatchRunner:
    def give_up() -> None:
        given_up.append(len(fleet.reported))
        hand.close()

    runner = BatchRunner(fleet, hand, residency, stages, give_up, sleeps.append)
    runner.offer_slots()
    return runner


@pytest.fixture
def batch(make_batch: Callable[..., Batch], make_items: MakeItems) -> Batch:
    return make_batch(make_items("1", "2"))


@pytest.fixture
def take(fleet: Any) -> Callable[..., SlotToken]:
    """A slot the worker offered, as a dispatcher takes it."""

    def pop(seat: Any = "any") -> SlotToken:
        token: SlotToken = fleet.slots[seat].popleft()
        return token

    return pop


def reports(fleet: Any) -> list[tuple[str, int]]:
    return [(done.batch_id, len(done.items)) for done in fleet.read_inbox()]


def offers(fleet: Any) -> int:
    return sum(map(len, fleet.slots.values()))


def test_the_task_has_its_wire_name(runner: BatchRunner) -> None:
    registered: dict[str, Any] = {}

    class App:
        def task(self, *, name: str, **options: Any) -> Any:
            return lambda function: registered.update({name: (function, options)})

    runner.register(App())

    assert registered == {RUN_BATCH: (runner.run_batch, {"ignore_result": True})}


def test_a_batch_is_run_and_reported_and_its_slot_offered_again(
    runner: BatchRunner, fleet: Any, hand: Hand, stages: FakeStages, batch: Batch, send: Any,
    take: Any,
) -> None:  # fmt: skip
    slot = send(batch, token=take())

    runner.run_batch(batch.id, slot)

    assert stages.ran == [batch]
    (completion,) = fleet.read_inbox()
    assert (completion.batch_id, completion.worker) == (batch.id, "w")
    assert [item.answer for item in completion.items] == [b"{}", b"{}"]
    assert hand.held() == []
    assert offers(fleet) == hand.capacity == len(hand.offers())
    assert not fleet.leased(batch.id)
    assert runner.jobs_done == 2


def test_while_it_runs_a_batch_is_in_hand_and_has_begun_for_fleet_and_watchdog(
    runner: BatchRunner, fleet: Any, hand: Hand, stages: FakeStages, batch: Batch, send: Any,
    take: Any,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    seen: list[Any] = []

    def look(batch: Batch) -> None:
        seen.extend([batch.id in fleet.begun, [h.batch.id for h in hand.begun()], offers(fleet)])

    stages.during = look
    runner.run_batch(batch.id, slot)

    assert seen == [True, [batch.id], 2]


def test_while_it_is_reported_a_batch_is_in_hand_but_no_longer_on_the_watchdogs_clock(
    runner: BatchRunner, fleet: Any, hand: Hand, batch: Batch, send: Any, take: Any, faults: Any,
    sleeps: list[float], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    faults.fail("fleet.complete", times=3)
    seen: list[Any] = []
    monkeypatch.setattr(
        runner, "_sleep", lambda s: seen.append((len(hand.held()), len(hand.begun())))
    )

    runner.run_batch(batch.id, slot)

    assert seen == [(1, 0)] * 3


@pytest.mark.parametrize("gone", ["batch", "lease"])
def test_a_batch_that_is_not_under_lease_any_more_is_not_run(
    runner: BatchRunner, fleet: Any, stages: FakeStages, batch: Batch, send: Any, take: Any,
    hand: Hand, gone: str,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    (fleet.batches if gone == "batch" else fleet.leases).clear()

    runner.run_batch(batch.id, slot)

    assert stages.ran == []
    assert reports(fleet) == []
    assert offers(fleet) == hand.capacity


def test_a_lease_lost_before_it_begins_ends_the_matter(
    runner: BatchRunner, fleet: Any, stages: FakeStages, batch: Batch, send: Any, take: Any,
    hand: Hand, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    monkeypatch.setattr(fleet, "begin", lambda batch: False)

    runner.run_batch(batch.id, slot)

    assert stages.ran == []
    assert reports(fleet) == []
    assert offers(fleet) == hand.capacity


def test_a_lease_lost_while_it_ran_is_not_reported(
    runner: BatchRunner, fleet: Any, stages: FakeStages, batch: Batch, send: Any, take: Any,
    hand: Hand,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    stages.during = lambda batch: fleet.leases.clear()

    runner.run_batch(batch.id, slot)

    assert reports(fleet) == []
    assert offers(fleet) == hand.capacity


# ── Redis away ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", ["fleet.fetch", "fleet.begin", "fleet.offer"])
def test_a_redis_that_is_away_never_raises_out_of_the_task(
    runner: BatchRunner, batch: Batch, send: Any, take: Any, hand: Hand, faults: Any, call: str
) -> None:
    slot = send(batch, token=take())
    faults.fail(call)

    runner.run_batch(batch.id, slot)

    assert hand.held() == []


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("call", ["fleet.complete"])
def test_a_report_waits_for_redis_and_is_made_once(
    runner: BatchRunner, fleet: Any, stages: FakeStages, batch: Batch, send: Any, take: Any,
    hand: Hand, faults: Any, sleeps: list[float], call: str, answer_lost: bool,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    if answer_lost:
        faults.lose_answer(call)
    else:
        faults.fail(call, times=5)

    runner.run_batch(batch.id, slot)

    assert len(stages.ran) == 1
    assert reports(fleet) == [(batch.id, 2)]
    assert len(sleeps) == (1 if answer_lost else 5)
    assert offers(fleet) == hand.capacity


def test_a_report_is_given_up_in_the_end(
    runner: BatchRunner, fleet: Any, batch: Batch, send: Any, take: Any, hand: Hand, faults: Any,
    sleeps: list[float],
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    faults.always.add("fleet.complete")

    runner.run_batch(batch.id, slot)

    assert len(sleeps) == REPORT_TRIES
    assert hand.held() == []
    assert reports(fleet) == []


def test_slots_that_could_not_be_offered_are_found_missing_later(
    runner: BatchRunner, fleet: Any, batch: Batch, send: Any, take: Any, hand: Hand, faults: Any
) -> None:
    slot = send(batch, token=take())
    faults.fail("fleet.offer")
    runner.run_batch(batch.id, slot)
    assert offers(fleet) == hand.capacity - 1

    for _ in range(3):
        tokens = hand.offers()
        hand.missing(tokens, fleet.offered(tokens))
    runner.offer_slots()

    assert offers(fleet) == hand.capacity


# ── models ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("failure", "passing"),
    [
        (InvalidModel("model_step_invalid", "No such step."), False),
        (Transient("storage_unavailable", "Away."), True),
        (InferenceFailed("model_removed", "Gone."), False),
        (PipelineError("s3_credentials", "Denied."), True),
    ],
)
def test_when_the_model_does_not_load_every_item_fails_for_that_reason(
    runner: BatchRunner, fleet: Any, residency: FakeResidency, batch: Batch, send: Any, take: Any,
    failure: PipelineError, passing: bool,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    residency.failure = failure

    runner.run_batch(batch.id, slot)

    (completion,) = fleet.read_inbox()
    assert [(i.code, i.message, i.retry) for i in completion.items] == [
        (failure.code, failure.message, passing)
    ] * 2
    assert runner.jobs_done == (0 if passing else 2)


def test_a_bug_in_loading_a_model_is_reported_and_does_not_pass_for_a_dead_worker(
    runner: BatchRunner, fleet: Any, residency: FakeResidency, batch: Batch, send: Any, take: Any
) -> None:
    """Unreported, the jobs would be suspect, and fail as `worker_died` after several leases."""
    slot = send(batch, token=take())
    residency.failure = TypeError("a step's factory")

    runner.run_batch(batch.id, slot)

    (completion,) = fleet.read_inbox()
    assert [item.code is not None for item in completion.items] == [True, True]


def test_a_model_that_is_being_loaded_is_not_on_the_watchdogs_clock(
    runner: BatchRunner, fleet: Any, hand: Hand, batch: Batch, send: Any, take: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Suspect is what decodes or computes; max_run_s is of one batch, not of a model's first load."""
    slot = send(batch, token=take())
    seen: list[Any] = []

    @contextmanager
    def load(name: str, version: int) -> Iterator[str]:
        seen.append((len(hand.begun()), batch.id in fleet.begun))
        yield "model"

    monkeypatch.setattr(runner._residency, "use", load)
    runner.run_batch(batch.id, slot)

    assert seen == [(0, False)]


# ── the device ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", ["load", "run"])
def test_after_a_device_that_failed_the_batch_is_reported_and_no_slot_offered_any_more(
    runner: BatchRunner, fleet: Any, hand: Hand, residency: FakeResidency, stages: FakeStages,
    batch: Batch, send: Any, take: Any, given_up: list[int], at: str,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    failure = Transient(DEVICE_FAILED, "Expected CUDA's cuStreamSynchronize to succeed.")
    if at == "load":
        residency.failure = failure
    else:
        stages.answers = [failed(failure), ItemOutcome(b"{}")]
    before = offers(fleet)

    runner.run_batch(batch.id, slot)

    (completion,) = fleet.read_inbox()
    first = completion.items[0]
    assert (first.code, first.retry) == (DEVICE_FAILED, True)
    assert given_up == [1]
    assert offers(fleet) == before
    assert hand.held() == []


def test_a_batch_that_waits_for_a_suspect_one_does_not_run_on_the_device_that_this_has_lost(
    runner: BatchRunner, fleet: Any, stages: FakeStages, hand: Hand, make_batch: Any,
    make_items: MakeItems, send: Any, take: Any, crew: Any, soon: Soon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    suspect, other = make_batch(make_items("1"), alone=True), make_batch(make_items("2", "3"))
    slots = {b.id: send(b, token=take()) for b in (suspect, other)}
    running, waits, go_on = threading.Event(), threading.Event(), threading.Event()
    offer_slots = runner.offer_slots

    def during(batch: Batch) -> None:
        running.set()
        soon(go_on)

    def used(token: SlotToken) -> None:
        if running.is_set():
            waits.set()

    stages.during = during
    stages.answers = [failed(Transient(DEVICE_FAILED, "CUDA_ERROR_ILLEGAL_ADDRESS"))]
    monkeypatch.setattr(runner, "offer_slots", lambda: None)
    crew.run(runner.run_batch, suspect.id, slots[suspect.id])
    soon(running)
    monkeypatch.setattr(hand, "used", used)
    crew.run(runner.run_batch, other.id, slots[other.id])
    soon(waits)
    assert len(hand.held()) == 2
    go_on.set()
    crew.join()

    assert stages.ran == [suspect]
    assert sorted(reports(fleet)) == sorted([(suspect.id, 1), (other.id, 0)])
    offer_slots()
    assert offers(fleet) == hand.capacity - 2


def test_a_device_that_is_full_is_not_given_up(
    runner: BatchRunner, fleet: Any, hand: Hand, residency: FakeResidency, batch: Batch, send: Any,
    take: Any, given_up: list[int],
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    residency.failure = DeviceOutOfMemory("Expected room.")

    runner.run_batch(batch.id, slot)

    assert given_up == []
    assert offers(fleet) == hand.capacity


# ── drain ────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_that_comes_while_draining_is_given_back_unrun(
    runner: BatchRunner, fleet: Any, stages: FakeStages, batch: Batch, send: Any, take: Any,
    hand: Hand,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    hand.close()
    left = offers(fleet)

    runner.run_batch(batch.id, slot)

    assert stages.ran == []
    assert reports(fleet) == [(batch.id, 0)]
    assert batch.id not in fleet.begun
    assert offers(fleet) == left


def test_a_batch_that_runs_when_draining_begins_is_finished(
    runner: BatchRunner, fleet: Any, stages: FakeStages, batch: Batch, send: Any, take: Any,
    hand: Hand,
) -> None:  # fmt: skip
    slot = send(batch, token=take())
    stages.during = lambda batch: hand.close()

    runner.run_batch(batch.id, slot)

    assert reports(fleet) == [(batch.id, 2)]


def test_giving_back_while_redis_is_away_does_not_raise_out_of_the_task(
    runner: BatchRunner, batch: Batch, send: Any, take: Any, hand: Hand, faults: Any
) -> None:
    slot = send(batch, token=take())
    hand.close()
    faults.fail("fleet.complete")

    runner.run_batch(batch.id, slot)

    assert hand.held() == []


# ── alone ────────────────────────────────────────────────────────────────────────────────────────


def test_a_suspect_batch_runs_with_nothing_beside_it_and_keeps_its_lease_while_it_waits(
    runner: BatchRunner, fleet: Any, stages: FakeStages, hand: Hand, make_batch: Any,
    make_items: MakeItems, send: Any, take: Any, crew: Any, soon: Soon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shared, suspect = make_batch(make_items("1")), make_batch(make_items("2"), alone=True)
    slots = {b.id: send(b, token=take()) for b in (shared, suspect)}
    running, go_on, fetched = threading.Event(), threading.Event(), threading.Event()
    inside: list[str] = []
    beside: list[int] = []

    def during(batch: Batch) -> None:
        inside.append(batch.id)
        if batch is not suspect and batch.id == shared.id:
            running.set()
            soon(go_on)
        beside.append(len(inside))
        inside.remove(batch.id)

    fetch = fleet.fetch

    def tell(batch_id: str) -> Any:
        found = fetch(batch_id)
        if batch_id == suspect.id:
            fetched.set()
        return found

    monkeypatch.setattr(fleet, "fetch", tell)
    stages.during = during
    crew.run(runner.run_batch, shared.id, slots[shared.id])
    soon(running)
    waits = threading.Event()
    hold = hand.hold

    def hold_and_tell(batch: Batch, seat: Any) -> Any:
        held = hold(batch, seat)
        waits.set()
        return held

    monkeypatch.setattr(hand, "hold", hold_and_tell)
    crew.run(runner.run_batch, suspect.id, slots[suspect.id])
    soon(fetched)
    soon(waits)
    assert {held.batch.id for held in hand.held()} == {shared.id, suspect.id}
    assert [held.batch.id for held in hand.begun()] == [shared.id]
    assert suspect.id not in fleet.begun
    go_on.set()
    crew.join()

    assert [batch.id for batch in stages.ran] == [shared.id, suspect.id]
    assert beside == [1, 1]
    assert sorted(reports(fleet)) == sorted([(shared.id, 1), (suspect.id, 1)])
