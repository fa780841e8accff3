"""Lets batches run side by side, but a suspect one with nothing beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Shared or exclusive passage. Who asks for exclusive passage goes before later shared ones."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._asking = 0

    @contextmanager
    def passage(self, *, alone: bool) -> Iterator[None]:
        """Wait for one's turn; bounded by the loads and runs inside, each of which the watchdog bounds."""
        self._enter(alone)
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._alone = False
                self._changed.notify_all()

    def _enter(self, alone: bool) -> None:
        with self._changed:
            if alone:
                self._asking += 1
                self._changed.wait_for(lambda: self._inside == 0)
                self._asking -= 1
                self._alone = True
            else:
                self._changed.wait_for(lambda: not self._alone and not self._asking)
            self._inside += 1
