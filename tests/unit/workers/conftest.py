"""The world around the workers, in memory and on a clock that only tests move: an event log, the
fleet's side of Redis, mailboxes, the job view. Each can be told to fail."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.eventlog import Moved, NewRecord, Position, Record
from infra.fleet import Phase, Seat, Signals, SlotToken, WorkerBeat
from infra.job_view import LEFT, Ended
from schemas.batches import (
    Assignment,
    Batch,
    Completion,
    decode_batch,
    decode_completion,
    encode,
)
from schemas.errors import InvalidJob, Transient
from schemas.results import Outcome, decode_outcome


@dataclass
class Clock:
    """One time for all: `wall()` in seconds since the epoch, `monotonic()` from zero."""

    start: float
    passed_s: float = 0.0

    def advance(self, seconds: float) -> None:
        self.passed_s += seconds

    def wall(self) -> float:
        return self.start + self.passed_s

    def monotonic(self) -> float:
        return self.passed_s


@dataclass
class Faults:
    """What is to fail. A call is named `part.method`; `after` fails it when it has taken effect."""

    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    always: set[str] = field(default_factory=set)

    def fail(self, call: str, times: int = 1) -> None:
        self.before[call] += times

    def lose_answer(self, call: str) -> None:
        self.after[call] += 1

    def begin(self, call: str) -> None:
        if call in self.always or call.split(".")[0] in self.always:
            raise Transient(f"{call}_down", f"{call} is told to be down")
        self._trip(self.before, call)

    def end(self, call: str) -> None:
        self._trip(self.after, call)

    def _trip(self, armed: Counter[str], call: str) -> None:
        if armed[call]:
            armed[call] -= 1
            raise Transient("told_to_fail", f"{call} is told to fail")


class FakeConsumer:
    """What `infra.eventlog.Consumer` promises, for one member. commits: each transaction."""

    def __init__(self, log: FakeLog, topics: Sequence[str], window: int) -> None:
        self._log = log
        self._topics = topics
        self._window = window
        self._next = dict.fromkeys(topics, 0)
        self.open: set[Position] = set()
        self.completed: list[Position] = []
        self.commits: list[tuple[list[Position], list[NewRecord]]] = []
        self.taken: list[Position] = []
        self._fresh = True
        self.asked_bytes: list[int] = []
        self.waited_s: list[float] = []
        self.paused: set[str] = set()

    def receive(self, max_records: int, max_bytes: int, timeout_s: float = 0) -> list[Record]:
        self._log.faults.begin("log.receive")
        self.asked_bytes.append(max_bytes)
        self.waited_s.append(timeout_s)
        received: list[Record] = []
        for topic in self._topics:
            for record in self._log.records[topic][self._next[topic] :]:
                held = sum(position.topic == topic for position in self.open)
                size = sum(len(r.value) for r in received) + len(record.value)
                if (
                    topic in self.paused
                    or held >= self._window
                    or len(received) == max_records
                    or (received and size > max_bytes)
                ):
                    break
                self._next[topic] += 1
                if record.position in self._log.completed | self.open:
                    continue
                self.open.add(record.position)
                received.append(record)
        return received

    def complete(self, positions: Iterable[Position], outputs: Sequence[NewRecord] = ()) -> None:
        self._log.faults.begin("log.complete")
        fresh = list(positions)
        if moved := set(self.taken) & set(fresh):
            raise Moved(f"{moved} moved")
        for output in outputs:
            headers = sum(len(name) + len(text) for name, text in output.headers.items())
            size = len(output.key) + headers + len(output.value)
            if size > self._log.largest_bytes:
                raise InvalidJob("record_too_large", f"{size} bytes")
        assert len(set(fresh)) == len(fresh), "a position was completed twice in one transaction"
        assert self.open.issuperset(fresh), "a position was completed that is not open"
        self.open.difference_update(fresh)
        self.completed += fresh
        self._log.completed |= set(fresh)
        self.commits.append((fresh, list(outputs)))
        self._log.append(outputs)

    def lose(self, *positions: Position) -> None:
        """Another member becomes their owner."""
        self.open.difference_update(positions)
        self.taken += positions

    def give(self) -> None:
        """This member becomes an owner: what is open comes (again)."""
        self._fresh = True
        for topic in self._topics:
            held = self._log.records[topic]
            open_ = [r.position.offset for r in held if r.position not in self._log.completed]
            self._next[topic] = min(open_, default=len(held))

    def lost(self) -> list[Position]:
        lost, self.taken = self.taken, []
        return lost

    def gained(self) -> bool:
        gained, self._fresh = self._fresh, False
        return gained

    def pause(self, topic: str) -> None:
        self.paused.add(topic)

    def resume(self, topic: str) -> None:
        self.paused.discard(topic)

    def close(self) -> None:
        pass


class FakeFollower:
    """What `infra.eventlog.Follower` promises."""

    def __init__(self, log: FakeLog, topics: Sequence[str], since: float) -> None:
        self._log = log
        self._since = since
        self._next = dict.fromkeys(topics, 0)

    def receive(self) -> list[Record]:
        self._log.faults.begin("log.follow")
        found = [r for topic, start in self._next.items() for r in self._log.records[topic][start:]]
        self._next = {topic: len(self._log.records[topic]) for topic in self._next}
        return [record for record in found if record.time >= self._since]

    def close(self) -> None:
        pass


class FakeLog:
    """What `infra.eventlog.EventLog` promises, as lists. consumers: members that joined."""

    def __init__(self, clock: Clock, faults: Faults) -> None:
        self.records: dict[str, list[Record]] = defaultdict(list)
        self.faults = faults
        self._clock = clock
        self.trims: list[dict[str, float]] = []
        self.completed: set[Position] = set()
        self.largest_bytes = 2**30

    def append(self, records: Sequence[NewRecord]) -> None:
        self.faults.begin("log.append")
        for new in records:
            held = self.records[new.topic]
            at = Position(new.topic, 0, len(held))
            held.append(Record(at, new.key, new.headers, new.value, self._clock.wall()))

    def consumer(self, group: str, topics: Sequence[str], *, window: int = 4096) -> FakeConsumer:
        return FakeConsumer(self, topics, window)

    def read(self, topics: Sequence[str], since: float) -> Iterator[Record]:
        for topic in topics:
            for record in list(self.records[topic]):
                self.faults.begin("log.read")
                if record.time >= since:
                    yield record

    def follow(self, topics: Sequence[str], since: float) -> FakeFollower:
        return FakeFollower(self, topics, since)

    def trim(self, retention_s: dict[str, float]) -> int:
        self.trims.append(retention_s)
        return 0

    def forget(self) -> None:
        self.records.clear()
        self.completed.clear()

    def outcomes(self) -> list[Outcome]:
        return [decode_outcome(record.value) for record in self.records["results"]]

    def statuses(self) -> dict[str, str]:
        """How each job ended; asserts that it did once."""
        outcomes = self.outcomes()
        by_job = {outcome.job_id: outcome.status for outcome in outcomes}
        assert len(by_job) == len(outcomes), f"a job ended twice: {outcomes}"
        return dict(by_job)


class FakeFleet:
    """What `infra.fleet.Fleet` does, without Redis. Leases end on the clock."""

    def __init__(self, clock: Clock, faults: Faults) -> None:
        self._clock = clock
        self._faults = faults
        self.flush()
        self.waits: list[tuple[list[Seat], float]] = []
        self.rung = False

    def flush(self) -> None:
        """Lose everything, as FLUSHALL does."""
        self.slots: dict[Seat, deque[SlotToken]] = {"any": deque(), "live": deque()}
        self.batches: dict[str, bytes] = {}
        self.leases: dict[str, float] = {}
        self.begun: set[str] = set()
        self.inbox: deque[str] = deque()
        self.reported: dict[str, bytes] = {}
        self.out: dict[str, Assignment] = {}
        self.alive: set[str] = set()
        self.beats: list[WorkerBeat] = []
        self.mail = 0

    def leased(self, batch_id: str) -> bool:
        return self.leases.get(batch_id, 0.0) > self._clock.monotonic()

    # ── dispatcher ───────────────────────────────────────────────────────────────────────────────

    def wait(self, slot: int, seats: Sequence[Seat], timeout_s: float) -> Signals:
        self.waits.append((list(seats), timeout_s))
        with self._call("wait"):
            if self.inbox:
                return Signals(self.read_inbox(), None)
            if self.rung:
                self.rung = False
                return Signals([], None, rung=True)
            for seat in seats:
                if self.slots[seat]:
                    token = self.slots[seat].popleft()
                    return Signals([], token if token.worker in self.alive else None)
        return Signals([], None)

    def reports(self, batch_ids: Sequence[str]) -> list[Completion]:
        with self._call("reports"):
            found = [self.reported.get(batch_id) for batch_id in batch_ids]
        return [decode_completion(raw) for raw in found if raw is not None]

    def forget(self, batch_ids: Sequence[str]) -> None:
        with self._call("forget"):
            for batch_id in batch_ids:
                self.out.pop(batch_id, None)
                self.reported.pop(batch_id, None)

    def assignments(self) -> list[Assignment]:
        with self._call("assignments"):
            return [
                out
                for id_, out in self.out.items()
                if self.leased(id_) or id_ in self.begun or id_ in self.reported
            ]

    def take_slot(self, seats: Sequence[Seat]) -> SlotToken | None:
        with self._call("take_slot"):
            for seat in seats:
                while self.slots[seat]:
                    token = self.slots[seat].popleft()
                    if token.worker in self.alive:
                        return token
        return None

    def exchange(self, token: SlotToken, workers: Iterable[str]) -> SlotToken:
        with self._call("exchange"):
            slots, wanted = self.slots[token.seat], set(workers)
            found = next((slot for slot in slots if slot.worker in wanted), None)
            if found is None:
                return token
            slots.remove(found)
            slots.append(token)
            return found

    def workers(self) -> list[WorkerBeat]:
        with self._call("workers"):
            latest = {beat.worker: beat for beat in self.beats}
            return [beat for name, beat in latest.items() if name in self.alive]

    def lease(self, batch: Batch, worker: str) -> None:
        with self._call("lease"):
            self.out[batch.id] = Assignment(
                batch.id,
                worker,
                batch.version,
                [item.job_id for item in batch.items],
                [item.attempt for item in batch.items],
            )
            self.batches[batch.id] = encode(batch)
            self.leases[batch.id] = self._clock.monotonic() + batch.lease_s

    def phases(self, batch_ids: Sequence[str]) -> list[Phase]:
        with self._call("phases"):
            return [
                Phase(self.leased(id_), id_ in self.begun, id_ in self.reported)
                for id_ in batch_ids
            ]

    # ── worker ───────────────────────────────────────────────────────────────────────────────────

    def fetch(self, batch_id: str) -> Batch | None:
        with self._call("fetch"):
            raw = self.batches.get(batch_id)
        return decode_batch(raw) if raw is not None and self.leased(batch_id) else None

    def begin(self, batch: Batch) -> bool:
        with self._call("begin"):
            if self.leased(batch.id):
                self.begun.add(batch.id)
                self.leases[batch.id] = self._clock.monotonic() + batch.lease_s
            return self.leased(batch.id)

    def complete(self, batch: Batch, completion: Completion) -> bool:
        with self._call("complete"):
            if not self.leased(batch.id):
                return False
            self.inbox.append(batch.id)
            self.reported[batch.id] = encode(completion)
            self.leases.pop(batch.id, None)
            self.begun.discard(batch.id)
            self.batches.pop(batch.id, None)
        return True

    def offer(self, token: SlotToken) -> None:
        with self._call("offer"):
            self.slots[token.seat].append(token)

    def offered(self, tokens: Sequence[SlotToken]) -> list[bool]:
        with self._call("offered"):
            return [token in self.slots[token.seat] for token in tokens]

    def clear_slots(self, worker: str) -> None:
        with self._call("clear_slots"):
            for seat, tokens in self.slots.items():
                self.slots[seat] = deque(token for token in tokens if token.worker != worker)

    def unread(self, worker: str) -> int:
        with self._call("unread"):
            return self.mail

    def beat(self, beat: WorkerBeat, renew: Iterable[str], lease_ms: int) -> None:
        with self._call("beat"):
            self.alive.add(beat.worker)
            self.beats.append(beat)
            for batch_id in renew:
                self.leases[batch_id] = self._clock.monotonic() + lease_ms / 1000

    def sign_off(self, worker: str) -> None:
        with self._call("sign_off"):
            self.alive.discard(worker)

    def read_inbox(self) -> list[Completion]:
        found = [self.reported[batch_id] for batch_id in self.inbox if batch_id in self.reported]
        self.inbox.clear()
        return [decode_completion(raw) for raw in found]

    def _call(self, name: str) -> _Call:
        return _Call(self._faults, f"fleet.{name}")


@dataclass
class _Call:
    """A call that may fail before it does anything, or when it is done."""

    faults: Faults
    name: str

    def __enter__(self) -> None:
        self.faults.begin(self.name)

    def __exit__(self, *raised: object) -> None:
        if raised == (None, None, None):
            self.faults.end(self.name)


class FakeMailboxes:
    """sent: (worker, batch id, slot) of every message, and `take()` them as workers would."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.sent: list[tuple[str, str, SlotToken]] = []
        self._unread: deque[tuple[str, str, SlotToken]] = deque()

    def send(self, worker: str, batch_id: str, slot: str) -> None:
        with _Call(self._faults, "mailboxes.send"):
            message = (worker, batch_id, SlotToken.unpack(slot))
            self.sent.append(message)
            self._unread.append(message)

    def take(self) -> list[tuple[str, str, SlotToken]]:
        unread = list(self._unread)
        self._unread.clear()
        return unread


class FakeView:
    """What `infra.job_view.JobView` does. told: notices, by client. ttls_s: of what was shown as ended."""

    writer = 0

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.told: dict[str, list[str]] = defaultdict(list)
        self.ttls_s: list[int] = []
        self.forget()

    def forget(self) -> None:
        self.values: dict[str, bytes] = {}
        self.mark_of: dict[int, float] = {}

    def show(self, outcomes: Sequence[tuple[str, bytes]], ttl_s: int) -> None:
        with _Call(self._faults, "view.show"):
            self.values |= dict(outcomes)

    def ended(self, jobs: Sequence[Ended], ttl_s: int, complete_to: float | None) -> bool:
        with _Call(self._faults, "view.ended"):
            self.ttls_s.append(ttl_s)
            for job in jobs:
                self.values[job.job_id] = job.value
                if job.reply_to:
                    self.told[job.reply_to].append(job.job_id)
            if complete_to is None:
                return True
            if self.writer not in self.mark_of:
                return False
            self.mark_of[self.writer] = complete_to
            return True

    def rebuild_from(self, since: float) -> None:
        with _Call(self._faults, "view.rebuild_from"):
            self.mark_of.setdefault(self.writer, since)

    def marks(self) -> dict[int, float]:
        with _Call(self._faults, "view.marks"):
            standing = {writer: mark for writer, mark in self.mark_of.items() if writer != LEFT}
            return standing or dict(self.mark_of)

    def move_marks(self, writers: Iterable[int], complete_to: float) -> bool:
        with _Call(self._faults, "view.move_marks"):
            stand = [writer for writer in writers if writer in self.mark_of]
            self.mark_of |= dict.fromkeys(stand, complete_to)
            return len(stand) == len(list(writers))

    def sign_off(self) -> None:
        if (mark := self.mark_of.pop(self.writer, None)) is not None:
            self.mark_of[LEFT] = mark

    def statuses(self) -> dict[str, str]:
        return {id_: decode_outcome(value).status for id_, value in self.values.items()}


@pytest.fixture
def clock(noon: float) -> Clock:
    return Clock(noon)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def log(clock: Clock, faults: Faults) -> FakeLog:
    return FakeLog(clock, faults)


@pytest.fixture
def fleet(clock: Clock, faults: Faults) -> FakeFleet:
    return FakeFleet(clock, faults)


@pytest.fixture
def mailboxes(faults: Faults) -> FakeMailboxes:
    return FakeMailboxes(faults)


@pytest.fixture
def view(faults: Faults) -> FakeView:
    return FakeView(faults)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(items, id="b")`: a batch of items for model `echo`."""
    numbers = itertools.count(1)

    def make(items: Sequence[Any] = (), **facts: Any) -> Batch:
        defaults: dict[str, Any] = {
            "id": f"batch-{next(numbers)}",
            "model": "echo",
            "version": 1,
            "reply_to": 0,
            "lease_s": 10.0,
            "max_run_s": 60.0,
            "alone": False,
        }
        return Batch(**(defaults | facts), items=list(items))

    return make
