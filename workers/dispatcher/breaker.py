"""A circuit breaker per model version and tenant: what only makes dead letters is held back for a while.

Pure, on a clock that is handed in (`now`: seconds since the epoch, because held jobs wait for `retry_at`).
Closed: jobs go, and failures are counted. Open: none goes. Half open, once the cool-down is over: one
probe goes, and a success closes the circuit; else the next probe waits twice as long.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from workers.dispatcher.memory import OpenJob

if TYPE_CHECKING:
    from infra.settings import BreakerSettings


class CircuitKey(NamedTuple):
    """version: the pinned one."""

    model: str
    version: int
    tenant: str


def circuit_of(job: OpenJob) -> CircuitKey:
    return CircuitKey(job.card.name, job.card.version, job.job.tenant)


@dataclass(slots=True)
class Circuit:
    """ended, failed: in the window that began at window_at. in_a_row: failures since the last success.
    retry_at: when the next probe may go; None while closed. probes: sent since it opened."""

    window_at: float
    ended: int = 0
    failed: int = 0
    in_a_row: int = 0
    retry_at: float | None = None
    probes: int = 0


class Breaker:
    """Remembers so many keys; the one unheard of for longest is forgotten, and so closed."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._circuits: OrderedDict[CircuitKey, Circuit] = OrderedDict()

    def record(self, key: CircuitKey, ok: bool, now: float) -> bool:
        """A job has run for the last time: ok, or it becomes a dead letter. Whether this opened the circuit.

        Jobs that are wrong in themselves and failures that are retried are none of the breaker's business.
        """
        circuit = self._circuit(key, now)
        if circuit.retry_at is not None:
            # What was under way when the circuit opened proves nothing; the answer to a probe does.
            if ok and circuit.probes:
                self._circuits[key] = Circuit(now)
            return False
        self._count(circuit, ok, now)
        if not self._trips(circuit):
            return False
        circuit.retry_at = now + self._settings.cooldown_s
        return True

    def allows(self, key: CircuitKey, now: float) -> bool:
        """Whether a job may be dispatched: the circuit is closed, or a probe is due."""
        circuit = self._circuits.get(key)
        return circuit is None or circuit.retry_at is None or now >= circuit.retry_at

    def sent(self, key: CircuitKey, now: float) -> None:
        """Jobs that were allowed went out. With an open circuit they are the probe, and the only one
        until the next cool-down is over, so that a probe that never ends is followed by another."""
        circuit = self._circuits.get(key)
        if circuit is not None and circuit.retry_at is not None:
            circuit.probes += 1
            doubled_s = self._settings.cooldown_s * 2 ** min(circuit.probes, 32)
            circuit.retry_at = now + min(self._settings.cooldown_cap_s, doubled_s)
            self._circuits.move_to_end(key)

    def retry_at(self, key: CircuitKey) -> float | None:
        """When an open circuit lets its next probe go; None for a closed one."""
        circuit = self._circuits.get(key)
        return circuit.retry_at if circuit else None

    def open_keys(self) -> dict[CircuitKey, float]:
        """The open circuits, each with when its next probe may go. Looks at every key: call it now and then."""
        return {
            key: circuit.retry_at
            for key, circuit in self._circuits.items()
            if circuit.retry_at is not None
        }

    def _circuit(self, key: CircuitKey, now: float) -> Circuit:
        circuit = self._circuits.get(key)
        if circuit is None:
            circuit = self._circuits[key] = Circuit(now)
            if len(self._circuits) > self._settings.keys:
                self._circuits.popitem(last=False)
        else:
            self._circuits.move_to_end(key)
        return circuit

    def _count(self, circuit: Circuit, ok: bool, now: float) -> None:
        if now - circuit.window_at >= self._settings.window_s:
            circuit.window_at, circuit.ended, circuit.failed = now, 0, 0
        circuit.ended += 1
        circuit.failed += not ok
        circuit.in_a_row = 0 if ok else circuit.in_a_row + 1

    def _trips(self, circuit: Circuit) -> bool:
        limits = self._settings
        if circuit.in_a_row >= limits.consecutive:
            return True
        return circuit.ended >= limits.min_jobs and circuit.failed >= limits.ratio * circuit.ended
