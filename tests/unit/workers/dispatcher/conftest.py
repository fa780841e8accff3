"""A dispatcher put together from its real parts, over the fakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from infra.eventlog import NewRecord, Position
from infra.fleet import Seat, SlotToken
from infra.settings import BreakerSettings
from schemas.batches import Batch, Completion, ItemOutcome
from schemas.errors import InvalidJob, Transient
from schemas.jobs import Job, cancel_headers, job_headers, job_value
from schemas.models import ModelCard
from schemas.topics import CONTROL, lane_of
from workers.dispatcher.admit import Admitter
from workers.dispatcher.batching import Batcher
from workers.dispatcher.breaker import Breaker
from workers.dispatcher.fairness import LaneClock
from workers.dispatcher.intake import TOPICS, Intake
from workers.dispatcher.leases import Leases
from workers.dispatcher.loop import Dispatcher
from workers.dispatcher.memory import JobMemory, OpenJob
from workers.dispatcher.outcomes import Outcomes, RetryPolicy
from workers.dispatcher.ownership import Ownership
from workers.dispatcher.residents import Residents
from workers.dispatcher.settle import Settlement
from workers.dispatcher.view_writer import ViewTtl, ViewWriter
from workers.dispatcher.waiting import Waiting

LEASE_S = 10.0
RETRY_BASE_S, RETRY_CAP_S = 0.5, 60.0
VIEW_TTL_S, VIEW_JOBS = 3600, 500_000
MAX_DEADLINE_S = 3 * 24 * 3600.0


@pytest.fixture
def make_open(
    make_job: Callable[..., Job], make_card: Callable[..., ModelCard]
) -> Callable[..., OpenJob]:
    """`make_open(id="a", lane="bulk", card=card)`: an admitted job; its order is that of the calls."""
    order = itertools.count()

    def make(*, card: ModelCard | None = None, **facts: Any) -> OpenJob:
        card = card or make_card()
        number = next(order)
        job = make_job(
            modality=card.modality, **({"version": card.version, "model": card.name} | facts)
        )
        lane = lane_of(job.topic)
        assert lane is not None
        return OpenJob(job, Position(job.topic, 0, number), card, lane, number, job.submitted_at)

    return make


class Models:
    """The catalogue: `echo` is installed; any other model is added by its card."""

    def __init__(self, card: ModelCard) -> None:
        self.cards = {card.name: card}
        self.unreachable: set[str] = set()

    def add(self, card: ModelCard) -> ModelCard:
        self.cards[card.name] = card
        return card

    def resolve(self, name: str, version: int | None) -> ModelCard:
        if name in self.unreachable:
            raise Transient("storage_unavailable", "the store is told to be away")
        card = self.cards.get(name)
        if card is None or version not in (None, card.version):
            raise InvalidJob("model_unknown", f"No model {name!r} is installed.")
        return card


@dataclass
class World:
    """A dispatcher, and those it deals with: producers, workers, the log and Redis."""

    clock: Any
    log: Any
    fleet: Any
    mailboxes: Any
    view: Any
    models: Models
    consumer: Any
    memory: JobMemory
    batcher: Batcher
    leases: Leases
    outcomes: Outcomes
    view_writer: ViewWriter
    settlement: Settlement
    waiting: Waiting
    intake: Intake
    dispatcher: Dispatcher

    # ── producers ────────────────────────────────────────────────────────────────────────────────

    def submit(self, *jobs: Job) -> None:
        self.log.append(
            [NewRecord(job.topic, job.id, job_headers(job), job_value(job)) for job in jobs]
        )

    def cancel(self, job_id: str) -> None:
        self.log.append([NewRecord(CONTROL, job_id, cancel_headers("default", job_id), b"")])

    # ── dispatcher ───────────────────────────────────────────────────────────────────────────────

    def step(self, times: int = 1, *, draining: bool = False) -> None:
        for _ in range(times):
            self.dispatcher.step(draining=draining)

    def try_steps(self, times: int) -> None:
        """Step as the process does: what is Transient is tried again."""
        for _ in range(times):
            try:
                self.step()
            except Transient:
                continue

    # ── workers ──────────────────────────────────────────────────────────────────────────────────

    def offer(self, slots: int = 1, seat: Seat = "any", worker: str = "w") -> list[SlotToken]:
        """Slots of a living worker."""
        self.fleet.alive.add(worker)
        number = len(self.mailboxes.sent) + sum(map(len, self.fleet.slots.values()))
        tokens = [SlotToken(worker, "life", number + i, seat) for i in range(1, slots + 1)]
        for token in tokens:
            self.fleet.slots[seat].append(token)
        return tokens

    def fetched(self, *, begin: bool = True) -> list[Batch]:
        """The batches in the mailboxes that are still under lease, as workers fetch and begin them."""
        batches = [self.fleet.fetch(batch_id) for _, batch_id, _ in self.mailboxes.take()]
        held = [batch for batch in batches if batch is not None]
        if begin:
            for batch in held:
                self.fleet.begin(batch)
        return held

    def report(self, batch: Batch, items: Iterable[ItemOutcome] | None = None) -> None:
        """Answers for all items, unless told otherwise."""
        answers = [ItemOutcome(b'{"type":"echo"}') for _ in batch.items] if items is None else items
        self.fleet.complete(batch, Completion(batch.id, "w", list(answers)))

    def work(self) -> list[Batch]:
        """Fetch, answer and report whatever was sent."""
        batches = self.fetched()
        for batch in batches:
            self.report(batch)
        return batches

    def runnable(self) -> list[str]:
        """Ids of jobs in batches that a worker was told of and whose lease stands."""
        told = [self.fleet.fetch(batch_id) for _, batch_id, _ in self.mailboxes.sent]
        return sorted(item.job_id for batch in told if batch for item in batch.items)


@pytest.fixture
def make_world(
    clock: Any,
    log: Any,
    fleet: Any,
    mailboxes: Any,
    view: Any,
    make_card: Callable[..., ModelCard],
) -> Callable[..., World]:
    """`make_world(window_bytes=1000, max_attempts=2)`: what is not an option here is of the card."""

    def make(
        *,
        window: int = 4096,
        window_bytes: int = 64 * 1024 * 1024,
        batch_bytes: int = 8 * 1024 * 1024,
        keys_window_s: float = 24 * 3600,
        keys_most: int = 1000,
        breaker_settings: BreakerSettings | None = None,
        **card: Any,
    ) -> World:
        models = Models(make_card(**card))
        consumer = log.consumer("dispatcher", TOPICS, window=window)
        memory = JobMemory(keys_window_s, keys_most)
        batcher = Batcher(LaneClock(), batch_bytes)
        leases = Leases(LEASE_S)
        view_writer = ViewWriter(view, log, ViewTtl(VIEW_TTL_S, VIEW_JOBS))
        outcomes = Outcomes(consumer, memory, view_writer, RetryPolicy(RETRY_BASE_S, RETRY_CAP_S))
        breaker = Breaker(breaker_settings or BreakerSettings())
        waiting = Waiting()
        settlement = Settlement(leases, memory, batcher, outcomes, breaker, waiting)
        admitter = Admitter(models.resolve, memory, MAX_DEADLINE_S)
        ownership = Ownership(
            consumer, log, fleet, memory, batcher, leases, outcomes, view_writer, keys_window_s,
            clock.wall, clock.monotonic,
        )  # fmt: skip
        control = log.follow([CONTROL], 0)
        intake = Intake(
            consumer,
            control,
            ownership,
            admitter,
            memory,
            batcher,
            leases,
            outcomes,
            breaker,
            waiting,
            window_bytes,
        )
        dispatcher = Dispatcher(
            slot=0,
            lease_s=LEASE_S,
            fleet=fleet,
            mailboxes=mailboxes,
            view_writer=view_writer,
            intake=intake,
            batcher=batcher,
            leases=leases,
            settlement=settlement,
            outcomes=outcomes,
            residents=Residents(fleet, clock.monotonic),
            wall=clock.wall,
            monotonic=clock.monotonic,
        )
        return World(
            clock, log, fleet, mailboxes, view, models, consumer, memory, batcher, leases,
            outcomes, view_writer, settlement, waiting, intake, dispatcher,
        )  # fmt: skip

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
