"""Which worker has which models loaded, so that batches go where their engine is."""

from __future__ import annotations

import time
from collections.abc import Callable

from infra.fleet import Fleet

LOOK_EVERY_S = 1.0


class Residents:
    """As of the workers' last signs of life: a hint, which may be wrong."""

    def __init__(self, fleet: Fleet, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._monotonic = monotonic
        self._look_at = 0.0
        self._loaded: dict[str, frozenset[str]] = {}

    def look(self) -> None:
        """Ask again, now and then. Raises Transient."""
        if self._monotonic() >= self._look_at:
            beats = self._fleet.workers()
            self._loaded = {beat.worker: frozenset(beat.engines) for beat in beats if beat.ready}
            self._look_at = self._monotonic() + LOOK_EVERY_S

    def of(self, worker: str) -> frozenset[str] | None:
        """`name/version` of what it has loaded; None if it has not said."""
        return self._loaded.get(worker)

    def holders(self, model: str) -> list[str]:
        return [worker for worker, loaded in self._loaded.items() if model in loaded]
