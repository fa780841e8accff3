"""Whether Celery still hears the worker's mailbox.

When Redis goes away at the wrong moment, Celery's loop may forget its connection without a word, and wait for ever
(celery#8030). The worker lives on, offers slots and takes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

DEAF_S = 3.0


class Hearing:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._taken = 0
        self._heard_at = monotonic()

    def is_deaf(self, unread: int, taken: int, *, free: bool) -> bool:
        """Whether messages lie there for too long although somebody could take one. Ask at every beat.

        unread: messages in the mailbox. taken: batches since the start. free: a slot is.
        """
        now = self._monotonic()
        waiting = bool(unread) and free and taken == self._taken
        if waiting and now - self._heard_at < DEAF_S:
            return False
        self._taken, self._heard_at = taken, now
        return waiting
