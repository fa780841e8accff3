"""Dispatchers and workers meet here, in Redis: slots, batches under lease, inboxes, heartbeats.

Nothing in here is the only copy of anything. Losing it all costs one lease period.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from infra.logs import get_logger
from infra.redis_client import Redis, as_any, redis_errors
from schemas.batches import (
    Assignment,
    Batch,
    Completion,
    decode_assignment,
    decode_batch,
    decode_completion,
    encode,
)

Seat = Literal["any", "live"]
"""Which lanes a slot serves: any, or only those somebody waits on."""

HEARTBEAT_TTL_S = 5
REPORT_TTL_S = 3600
"""How long a report waits for its dispatcher, or for whoever owns its jobs next."""

COARSE_S = 0.02
"""Redis ends a wait late, when it has nothing else to do: up to a tenth of a second (its `hz`)."""

INBOX_READ = 256
BELL_TTL_S = 60

MAILBOXES = "headrace:celery:"
"""What the keys of Celery begin with."""

_ASSIGNMENTS = "headrace:assignments"
_DISPATCHERS = "headrace:dispatchers"
_WORKERS = "headrace:workers"

# At once, so that a Redis emptied in between leaves no batch that seems begun and without a lease. The lease begins
# anew: it may have been waited out in the mailbox of a worker that was starting.
_BEGIN = """
if redis.call('PEXPIRE', KEYS[1], ARGV[2]) == 0 then return 0 end
redis.call('SET', KEYS[2], '1', 'PX', ARGV[1])
return 1
"""

# At once, so that a report counts if and only if its lease still stood.
_REPORT = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[3])
redis.call('RPUSH', KEYS[3], ARGV[2])
redis.call('EXPIRE', KEYS[3], ARGV[3])
redis.call('DEL', KEYS[1], KEYS[4], KEYS[5])
return 1
"""

_RING = """
for _, slot in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    redis.call('DEL', ARGV[1] .. slot)
    redis.call('RPUSH', ARGV[1] .. slot, '1')
    redis.call('EXPIRE', ARGV[1] .. slot, ARGV[2])
end
"""

# At once, so that the slot given back for another one is never missing.
_EXCHANGE = """
local wanted = {}
for i = 2, #ARGV do wanted[ARGV[i]] = true end
for _, slot in ipairs(redis.call('LRANGE', KEYS[1], 0, 999)) do
    if wanted[string.match(slot, '^[^/]+')] then
        redis.call('LREM', KEYS[1], 1, slot)
        redis.call('RPUSH', KEYS[1], ARGV[1])
        return slot
    end
end
return false
"""

logger = get_logger("fleet")


class SlotToken(NamedTuple):
    """One worker's offer to take one batch. number: unique within the worker's life."""

    worker: str
    life: str
    number: int
    seat: Seat

    def packed(self) -> str:
        return f"{self.worker}/{self.life}/{self.number}/{self.seat}"

    @classmethod
    def unpack(cls, raw: str) -> SlotToken:
        worker, life, number, seat = raw.split("/")
        return cls(worker, life, int(number), "live" if seat == "live" else "any")


class WorkerBeat(Struct, frozen=True, kw_only=True):
    """A worker's sign of life. life: random per process. engines: `name/version` of what is loaded.
    start: seconds of its start by step, in order; cold_start_s: of all of it, 0 until it was ready."""

    worker: str
    life: str
    pid: int
    started_at: float
    ready: bool
    draining: bool
    slots: int
    batches: list[str]
    engines: list[str]
    memory_bytes: int
    jobs_done: int
    start: dict[str, float] = {}
    cold_start_s: float = 0.0


class LaneSnapshot(Struct, frozen=True):
    """waiting: admitted, not yet with a worker. oldest_s: age of the oldest of them."""

    waiting: int
    oldest_s: float


class DispatcherBeat(Struct, frozen=True, kw_only=True):
    """What a dispatcher holds right now; for status and explain only. held_back: models (of a tenant)
    that only make dead letters, and until when their jobs wait."""

    slot: int
    pid: int
    started_at: float
    at: float
    waiting: dict[str, LaneSnapshot]
    models: dict[str, int]
    delayed: int
    running: int
    running_jobs: int
    ended: dict[str, int]
    redispatched: int
    trouble: str | None
    held_back: dict[str, float] = {}


class Phase(NamedTuple):
    """leased: the batch's lease is alive. begun: it was being decoded or computed. reported: its
    worker is done with it."""

    leased: bool
    begun: bool
    reported: bool = False


class Signals(NamedTuple):
    """What ended a wait; nothing of it at the time limit. rung: the log has something new."""

    completions: list[Completion]
    token: SlotToken | None
    rung: bool = False


def mailbox(worker: str) -> str:
    """Celery's queue that only this worker reads."""
    return f"worker.{worker}"


def slots_key(seat: Seat) -> str:
    return f"headrace:slots:{seat}"


class Fleet:
    """Every method raises Transient (redis_unavailable) when Redis does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    # ── producers ────────────────────────────────────────────────────────────────────────────────

    def ring(self) -> None:
        """Wake the dispatchers: the log has something new."""
        with redis_errors():
            self._redis.eval(_RING, 1, _DISPATCHERS, _bell(""), BELL_TTL_S)

    # ── dispatcher ───────────────────────────────────────────────────────────────────────────────

    def wait(self, slot: int, seats: Sequence[Seat], timeout_s: float) -> Signals:
        """Sleep until there is a completion, a ring, or a slot of these seats, which is then taken."""
        keys = [_inbox(slot), _bell(slot), *(slots_key(seat) for seat in seats)]
        with redis_errors():
            popped = self._popped(keys, timeout_s)
            if popped is None:
                return Signals([], None)
            key, (value,) = popped
            if key == _inbox(slot).encode():
                return Signals(self._inbox_read(slot, [value]), None)
            if key == _bell(slot).encode():
                return Signals(self._inbox_read(slot, []), None, rung=True)
            token = SlotToken.unpack(value.decode())
            alive = self._redis.exists(_worker(token.worker))
            return Signals([], token if alive else None)

    def _popped(self, keys: Sequence[str], timeout_s: float) -> Any:
        """The first key that holds something, and that; None after the timeout. For a short one it sleeps here."""
        if timeout_s >= COARSE_S:
            return self._redis.blmpop(timeout_s, len(keys), *keys, direction="LEFT", count=1)
        if popped := self._redis.lmpop(len(keys), *keys, direction="LEFT", count=1):
            return popped
        time.sleep(timeout_s)
        return None

    def reports(self, batch_ids: Sequence[str]) -> list[Completion]:
        """What was reported of these batches, to whomever. It stays there until it is forgotten."""
        if not batch_ids:
            return []
        with redis_errors():
            raw = as_any(self._redis.mget([_report(batch_id) for batch_id in batch_ids]))
        return _decoded([value for value in raw if value is not None])

    def forget(self, batch_ids: Sequence[str]) -> None:
        """Drop all that is kept of batches whose every job was answered."""
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.hdel(_ASSIGNMENTS, *batch_ids)
            pipe.delete(*(_report(batch_id) for batch_id in batch_ids))
            pipe.execute()

    def assignments(self) -> list[Assignment]:
        """Of all batches in the fleet that are out, or of which something is still to be settled."""
        with redis_errors():
            raw = as_any(self._redis.hgetall(_ASSIGNMENTS))
        phases = self.phases([batch_id.decode() for batch_id in raw])
        over = [id_ for id_, phase in zip(raw, phases, strict=True) if not any(phase)]
        if over:
            with redis_errors():
                self._redis.hdel(_ASSIGNMENTS, *over)
        return [decode_assignment(raw[id_]) for id_ in raw.keys() - set(over)]

    def take_slot(self, seats: Sequence[Seat]) -> SlotToken | None:
        """A slot of a living worker, the first seat preferred; None when there is none."""
        with redis_errors():
            for seat in seats:
                while (raw := as_any(self._redis.lpop(slots_key(seat)))) is not None:
                    token = SlotToken.unpack(raw.decode())
                    if self._redis.exists(_worker(token.worker)):
                        return token
        return None

    def exchange(self, token: SlotToken, workers: Iterable[str]) -> SlotToken:
        """Give back a slot for a like one of these workers; the same slot where they have none free."""
        with redis_errors():
            key = slots_key(token.seat)
            raw = as_any(self._redis.eval(_EXCHANGE, 1, key, token.packed(), *workers))
        return SlotToken.unpack(raw.decode()) if raw else token

    def lease(self, batch: Batch, worker: str) -> None:
        """Put a batch where its worker will fetch it, under a lease that starts now."""
        lease_ms = int(batch.lease_s * 1000)
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(_batch(batch.id), encode(batch), px=2 * lease_ms)
            pipe.set(_lease(batch.id), b"1", px=lease_ms)
            pipe.hset(_ASSIGNMENTS, batch.id, encode(_assignment(batch, worker)))
            pipe.execute()

    def phases(self, batch_ids: Sequence[str]) -> list[Phase]:
        """How these batches stand, in order."""
        if not batch_ids:
            return []
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            for id_ in batch_ids:
                for key in (_lease(id_), _phase(id_), _report(id_)):
                    pipe.exists(key)
            found = [bool(answer) for answer in as_any(pipe.execute())]
        return [Phase(*found[i : i + 3]) for i in range(0, len(found), 3)]

    def show_dispatcher(self, beat: DispatcherBeat, ttl_s: int = HEARTBEAT_TTL_S) -> None:
        """A sign of life; from now on rings reach this dispatcher."""
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(_dispatcher(beat.slot), msgspec.json.encode(beat), ex=ttl_s)
            pipe.sadd(_DISPATCHERS, beat.slot)
            pipe.execute()

    def sign_off_dispatcher(self, slot: int) -> None:
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.delete(_dispatcher(slot))
            pipe.srem(_DISPATCHERS, slot)
            pipe.execute()

    def _inbox_read(self, slot: int, popped: list[bytes]) -> list[Completion]:
        """The reports that the inbox tells of, at most INBOX_READ and what was popped already."""
        more = as_any(self._redis.lpop(_inbox(slot), INBOX_READ)) or []
        return self.reports([batch_id.decode() for batch_id in (*popped, *more)])

    # ── worker ───────────────────────────────────────────────────────────────────────────────────

    def clear_slots(self, worker: str) -> None:
        """Withdraw every slot of a worker, those of its earlier lives included."""
        with redis_errors():
            for seat in ("any", "live"):
                for raw in as_any(self._redis.lrange(slots_key(seat), 0, -1)):
                    if SlotToken.unpack(raw.decode()).worker == worker:
                        self._redis.lrem(slots_key(seat), 0, raw)

    def offered(self, tokens: Sequence[SlotToken]) -> list[bool]:
        """Which of these slots are still there for the taking."""
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            for token in tokens:
                pipe.lpos(slots_key(token.seat), token.packed())
            return [position is not None for position in as_any(pipe.execute())]

    def fetch(self, batch_id: str) -> Batch | None:
        """The batch, if its lease is alive."""
        with redis_errors():
            leased, raw = as_any(self._redis.mget(_lease(batch_id), _batch(batch_id)))
        return decode_batch(raw) if leased is not None and raw is not None else None

    def begin(self, batch: Batch) -> bool:
        """Say that decoding starts: from here on this batch is suspect if its worker dies. False: the lease is lost."""
        ttl_ms = int((batch.max_run_s + 4 * batch.lease_s) * 1000)
        with redis_errors():
            keys = (_lease(batch.id), _phase(batch.id))
            lease_ms = int(batch.lease_s * 1000)
            return bool(as_any(self._redis.eval(_BEGIN, 2, *keys, ttl_ms, lease_ms)))

    def complete(self, batch: Batch, completion: Completion) -> bool:
        """Report a batch and end its lease. False if the lease was lost: then nobody hears of it."""
        id_ = batch.id
        keys = (_lease(id_), _report(id_), _inbox(batch.reply_to), _phase(id_), _batch(id_))
        with redis_errors():
            reported = self._redis.eval(
                _REPORT, len(keys), *keys, encode(completion), id_, REPORT_TTL_S
            )
        return bool(as_any(reported))

    def unread(self, worker: str) -> int:
        """How many messages wait in a worker's mailbox."""
        with redis_errors():
            return int(as_any(self._redis.llen(MAILBOXES + mailbox(worker))))

    def offer(self, token: SlotToken) -> None:
        """Put a slot up for the taking: a worker's own, or one that a dispatcher found no use for."""
        with redis_errors():
            self._redis.rpush(slots_key(token.seat), token.packed())

    def beat(self, beat: WorkerBeat, renew: Iterable[str], lease_ms: int) -> None:
        """A sign of life; renews the leases of the batches in hand, also those that Redis let run out
        while it stood still."""
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(_worker(beat.worker), msgspec.json.encode(beat), ex=HEARTBEAT_TTL_S)
            pipe.sadd(_WORKERS, beat.worker)
            for batch_id in renew:
                pipe.set(_lease(batch_id), b"1", px=lease_ms)
            pipe.execute()

    def sign_off(self, worker: str) -> None:
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.delete(_worker(worker))
            pipe.srem(_WORKERS, worker)
            pipe.execute()

    # ── onlookers ────────────────────────────────────────────────────────────────────────────────

    def workers(self) -> list[WorkerBeat]:
        """Those that gave a sign of life lately, by name. The others are forgotten; a later sign of theirs counts."""
        with redis_errors():
            names = sorted(name.decode() for name in as_any(self._redis.smembers(_WORKERS)))
            raw = as_any(self._redis.mget([_worker(name) for name in names])) if names else []
            gone = [name for name, value in zip(names, raw, strict=True) if not value]
            if gone:
                self._redis.srem(_WORKERS, *gone)
        return [msgspec.json.decode(value, type=WorkerBeat) for value in raw if value]

    def dispatchers(self) -> list[DispatcherBeat]:
        """Those that gave a sign of life lately, by slot."""
        with redis_errors():
            slots = sorted(int(slot) for slot in as_any(self._redis.smembers(_DISPATCHERS)))
            raw = as_any(self._redis.mget([_dispatcher(slot) for slot in slots])) if slots else []
        return [msgspec.json.decode(value, type=DispatcherBeat) for value in raw if value]


def _decoded(raw: Sequence[bytes]) -> list[Completion]:
    """What cannot be read is left out: the lease of its batch brings the jobs back."""
    completions = []
    for value in raw:
        try:
            completions.append(decode_completion(value))
        except msgspec.MsgspecError as error:
            logger.error("completion_unreadable", error=str(error))
    return completions


def _assignment(batch: Batch, worker: str) -> Assignment:
    return Assignment(
        batch.id,
        worker,
        batch.version,
        [item.job_id for item in batch.items],
        [item.attempt for item in batch.items],
    )


def new_batch_id() -> str:
    return secrets.token_hex(12)


def _inbox(slot: int) -> str:
    return f"headrace:inbox:{slot}"


def _bell(slot: int | str) -> str:
    return f"headrace:bell:{slot}"


def _report(batch_id: str) -> str:
    return f"headrace:report:{batch_id}"


def _batch(batch_id: str) -> str:
    return f"headrace:batch:{batch_id}"


def _lease(batch_id: str) -> str:
    return f"headrace:lease:{batch_id}"


def _phase(batch_id: str) -> str:
    return f"headrace:phase:{batch_id}"


def _worker(name: str) -> str:
    return f"headrace:worker:{name}"


def _dispatcher(slot: int) -> str:
    return f"headrace:dispatcher:{slot}"
