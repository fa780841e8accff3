"""Keeps disk use bounded: old records leave the log, old payloads and results leave the object store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from infra.eventlog import EventLog
from infra.logs import get_logger
from infra.objects import ObjectStore
from schemas.errors import PipelineError
from schemas.payloads import TENANTS
from schemas.topics import TOPIC_BY_NAME, TOPICS

TRIM_EVERY_S = 60.0
SWEEP_EVERY_S = 3600.0
KEEP_OBJECTS_S = max(topic.retention_s for topic in TOPICS)
"""An object outlives every record that may name it; one that none names goes at the same age."""

logger = get_logger("dispatcher.janitor")


class Janitor:
    """Works in a thread of its own, so that the loop never waits for it."""

    def __init__(
        self, log: EventLog, objects: ObjectStore, wall: Callable[[], float] = time.time
    ) -> None:
        self._log = log
        self._objects = objects
        self._wall = wall

    def run(self, stop: threading.Event) -> None:
        sweep_at = 0.0
        while not stop.wait(TRIM_EVERY_S):
            try:
                self.trim_log()
                if time.monotonic() >= sweep_at:
                    sweep_at = time.monotonic() + SWEEP_EVERY_S
                    self.sweep_objects(stop)
            except PipelineError as error:
                logger.warning("cleaning_failed", error=error.message, action="tries again")

    def trim_log(self) -> int:
        return self._log.trim({name: topic.retention_s for name, topic in TOPIC_BY_NAME.items()})

    def sweep_objects(self, stop: threading.Event) -> int:
        """Delete tenants' objects past their age; ends early when told to stop. Returns how many went."""
        swept = 0
        oldest = self._wall() - KEEP_OBJECTS_S
        for found in self._objects.list(TENANTS):
            if stop.is_set():
                break
            if found.modified < oldest:
                self._objects.delete(found.key)
                swept += 1
        return swept
