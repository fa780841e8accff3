"""Batches out with workers. Pure, on a monotonic clock that is handed in.

This memory is the authority: a completion counts only for the batch that is on record here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workers.dispatcher.memory import OpenJob


@dataclass(slots=True)
class Lease:
    """jobs: in the order they were sent. check_at: monotonic time when its sign of life is next looked for.
    shown: whether its jobs are shown as running."""

    batch_id: str
    worker: str
    jobs: list[OpenJob]
    sent_at: float
    check_at: float
    shown: bool = False


class Leases:
    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def grant(self, batch_id: str, worker: str, jobs: list[OpenJob], now: float) -> None:
        self._leases[batch_id] = Lease(batch_id, worker, jobs, now, now + self._lease_s)

    def take(self, batch_id: str) -> Lease | None:
        """End a lease; None if it is not (or no longer) ours."""
        return self._leases.pop(batch_id, None)

    def holds(self, batch_id: str) -> bool:
        return batch_id in self._leases

    def due(self, now: float) -> list[Lease]:
        """Leases that may have run out on the server by now."""
        return [lease for lease in self._leases.values() if now >= lease.check_at]

    def unshown(self, sent_before: float) -> list[Lease]:
        """Leases granted before a monotonic time whose jobs are not shown as running yet."""
        return [
            lease
            for lease in self._leases.values()
            if not lease.shown and lease.sent_at <= sent_before
        ]

    def not_before(self, when: float) -> None:
        """Look at no lease before a monotonic time."""
        for lease in self._leases.values():
            lease.check_at = max(lease.check_at, when)

    def all_due(self) -> None:
        """Look at every lease at the next chance (the server lost its memory)."""
        for lease in self._leases.values():
            lease.check_at = 0.0

    def renewed(self, batch_id: str, now: float) -> None:
        """Its worker still renews it. Look again soon: the server's clock counts, not this one."""
        if lease := self._leases.get(batch_id):
            lease.check_at = now + self._lease_s / 4
