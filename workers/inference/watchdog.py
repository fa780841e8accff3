"""Ends the process when a batch overruns its model's time, or a load takes too long. A thread that hangs cannot be
ended by itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from infra.logs import get_logger
from workers.inference.hand import Hand
from workers.inference.residency import Residency

LOOK_EVERY_S = 1.0
EXIT_OVERRUN = 70

logger = get_logger("worker.watchdog")


class Watchdog:
    """load_s: longest that a model may be loading. on_load_overran: called with `name/version` of one that
    takes longer, again and again."""

    def __init__(
        self,
        hand: Hand,
        resident: Residency,
        load_s: float,
        on_load_overran: Callable[[str], None],
        end: Callable[[int], None] = os._exit,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hand = hand
        self._resident = resident
        self._load_s = load_s
        self._on_load_overran = on_load_overran
        self._end = end
        self._monotonic = monotonic

    def look_until(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """Does not return if a batch has run for longer than its `max_run_s`."""
        now = self._monotonic()
        for model, since in self._resident.loading().items():
            if now - since > self._load_s:
                self._on_load_overran(model)
        for held in self._hand.begun():
            ran_s = now - held.began_at
            if ran_s > held.batch.max_run_s:
                logger.error(
                    "batch_overran",
                    batch=held.batch.id,
                    model=held.batch.model,
                    ran_s=round(ran_s, 1),
                    max_run_s=held.batch.max_run_s,
                    action="this process ends; its batches run again, each job alone",
                )
                self._end(EXIT_OVERRUN)
