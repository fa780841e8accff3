"""What a worker has in hand: the slots it offers, and the batches it took. Pure bookkeeping, thread-safe."""

from __future__ import annotations

import itertools
import secrets
import threading
from dataclasses import dataclass

from infra.fleet import Seat, SlotToken
from schemas.batches import Batch

MISSED_BEATS = 2
"""So often a slot must be found gone, with no batch come for it, before it counts as lost and is offered anew."""


@dataclass(slots=True)
class Held:
    """A batch in hand. began_at: monotonic time when decoding began, 0 before that."""

    batch: Batch
    seat: Seat
    began_at: float = 0.0


class Hand:
    """slots: batches of any lane at once; one more is kept for live lanes."""

    def __init__(self, worker: str, slots: int) -> None:
        self.worker = worker
        self.life = secrets.token_hex(4)
        self._capacity: dict[Seat, int] = {"any": slots, "live": 1}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._offers: dict[SlotToken, int] = {}
        self._held: dict[str, Held] = {}
        self._closed = False

    @property
    def capacity(self) -> int:
        return sum(self._capacity.values())

    def new_offers(self) -> list[SlotToken]:
        """Slots to offer now, so that offers and batches together fill the hand; none once it is closed."""
        with self._lock:
            if self._closed:
                return []
            fresh = [
                SlotToken(self.worker, self.life, next(self._numbers), seat)
                for seat, capacity in self._capacity.items()
                for _ in range(capacity - self._used(seat))
            ]
            self._offers.update(dict.fromkeys(fresh, 0))
            return fresh

    def offers(self) -> list[SlotToken]:
        with self._lock:
            return list(self._offers)

    def missing(self, tokens: list[SlotToken], offered: list[bool]) -> None:
        """Note which offers are still out; forget those that got lost on the way."""
        with self._lock:
            for token, there in zip(tokens, offered, strict=True):
                if token in self._offers:
                    self._offers[token] = 0 if there else self._offers[token] + 1
                    if self._offers[token] > MISSED_BEATS:
                        del self._offers[token]

    def used(self, token: SlotToken) -> None:
        """A batch came for this offer."""
        with self._lock:
            self._offers.pop(token, None)

    def hold(self, batch: Batch, seat: Seat) -> Held:
        with self._lock:
            held = self._held[batch.id] = Held(batch, seat)
            return held

    def drop(self, batch_id: str) -> None:
        with self._lock:
            self._held.pop(batch_id, None)

    def held(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def begun(self) -> list[Held]:
        return [held for held in self.held() if held.began_at]

    def close(self) -> None:
        """Offer nothing any more (drain)."""
        with self._lock:
            self._closed = True

    @property
    def closed(self) -> bool:
        return self._closed

    def _used(self, seat: Seat) -> int:
        offers = sum(token.seat == seat for token in self._offers)
        return offers + sum(held.seat == seat for held in self._held.values())
