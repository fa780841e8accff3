"""Ends the process when a batch overruns its model's time. A thread that hangs cannot be ended by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from infra.logs import get_logger
from workers.inference.hand import Hand

EXIT_OVERRUN = 70

logger = get_logger("worker.watchdog")


class Watchdog:
    def __init__(
        self,
        hand: Hand,
        end: Callable[[int], None] = os._exit,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hand = hand
        self._end = end
        self._monotonic = monotonic

    def look(self) -> None:
        """Call now and then. Does not return if a batch has run for longer than its `max_run_s`."""
        now = self._monotonic()
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
