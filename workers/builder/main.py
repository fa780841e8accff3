"""The builder process: put together here, run until SIGTERM, which it obeys between builds.

A build that is killed leaves nothing behind, and the next builder begins anew.
"""

from __future__ import annotations

import os
import threading
from functools import cached_property
from typing import TYPE_CHECKING

from infra.catalogue import Catalogue
from infra.embedded import announce_ready
from infra.health import STALLED_AFTER_S, Health, serve_health
from infra.logs import get_logger
from infra.objects import connect_objects
from infra.settings import Settings
from workers.builder.builder import Builder
from workers.process import PatientProcess, serve

if TYPE_CHECKING:
    from workers.builder.engines import InstalledEngines

LOOK_EVERY_S = 2.0
NICENESS = 10
"""Workers on the same machine go first."""

logger = get_logger("builder")


def main() -> int:
    return serve("builder", run)


def run(settings: Settings, stop: threading.Event) -> int:
    process = Process(settings)
    announce_ready(settings, "builder")
    os.nice(NICENESS)
    return process.run(stop)


class Process(PatientProcess):
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # An engine is waited for and then built, each for no longer than anybody waits for a build: beyond it is stuck.
        self.health = Health(STALLED_AFTER_S + 2 * settings.engines.build_wait_s)
        serve_health(settings, self.health)
        self.objects = connect_objects(settings)
        self.catalogue = Catalogue(self.objects)
        self.builder = Builder(
            self.catalogue.cards,
            lambda card: self.engines.see_built(card),
            lambda key: self.engines.holds(key),
            lambda key: self.engines.share(key),
            settings.engines.failure_memory_s,
        )
        self.idle = False

    @cached_property
    def engines(self) -> InstalledEngines:
        """Imported with the first model to build for: a builder with nothing to do stays small."""
        from workers.builder.engines import InstalledEngines

        return InstalledEngines(self.settings, self.objects, self.catalogue, self.health.progress)

    def run(self, stop: threading.Event) -> int:
        self.health.ready = True
        while not stop.is_set():
            self.health.progress()
            self.idle = True  # also after a step that fails
            self.patiently(self._step, pause_s=0)
            if self.idle:
                stop.wait(LOOK_EVERY_S)
        self.health.ready = False
        logger.info("stopped")
        return 0

    def _step(self) -> None:
        self.idle = not self.builder.step()


if __name__ == "__main__":
    raise SystemExit(main())
