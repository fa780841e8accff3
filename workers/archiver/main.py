"""The archiver process: put together here, run until SIGTERM, drained, closed in order."""

from __future__ import annotations

import threading
import time
from contextlib import closing

from infra.embedded import announce_ready
from infra.eventlog import Consumer, EventLog, Fenced
from infra.eventlog.open import open_log
from infra.health import Health, serve_health
from infra.lake import GROUP, need_pyarrow
from infra.logs import get_logger
from infra.objects import ObjectStore, connect_objects
from infra.preconditions import object_findings, preconditions
from infra.settings import Settings
from schemas.topics import RESULTS
from workers.process import EXIT_FENCED, PatientProcess, serve

WINDOW = 16_384
"""The largest segment that any archiver may have begun must fit."""

TROUBLE_PAUSE_S = 0.5
DRAIN_S = 10.0

logger = get_logger("archiver")


def main() -> int:
    return serve("archiver", run)


def run(settings: Settings, stop: threading.Event) -> int:
    need_pyarrow()
    preconditions(settings, (object_findings,))
    slot = settings.archiver.slot
    with closing(open_log(settings.log_address, kafka=settings.kafka, slot=slot)) as log:
        process = Process(settings, log, connect_objects(settings))
        announce_ready(settings, "archiver")
        return process.run(stop)


class Process(PatientProcess):
    """The archiver with what surrounds its loop: trouble, upkeep of the lake, drain."""

    def __init__(self, settings: Settings, log: EventLog, objects: ObjectStore) -> None:
        # Here, because without pyarrow these cannot be imported, and `main` says so in words.
        from workers.archiver.archive import Archive
        from workers.archiver.loop import Archiver
        from workers.archiver.segments import Limits
        from workers.archiver.upkeep import Upkeep

        options = settings.archiver
        self.health = Health()
        serve_health(settings, self.health)

        def join() -> Consumer:
            return log.consumer(GROUP, [RESULTS], window=WINDOW)

        limits = Limits(options.file_records, options.file_bytes, options.file_age_s)
        self.archiver = Archiver(
            join, Archive(objects), limits, options.memory_bytes, alive=self.health.progress
        )
        # One is enough; several at once would only do the same work.
        self.upkeep = Upkeep(objects, options.retention_days) if options.slot == 0 else None

    def run(self, stop: threading.Event) -> int:
        if self.upkeep:
            threading.Thread(
                target=self.upkeep.run, args=(stop,), name="upkeep", daemon=True
            ).start()
        try:
            self.health.ready = True
            while not stop.is_set():
                self.guarded_step()
            self.health.ready = False
            drain_until = time.monotonic() + DRAIN_S
            while self.archiver.drainable and time.monotonic() < drain_until:
                self.guarded_step(draining=True)
        except Fenced:
            logger.error("fenced", action="another archiver took over; this one ends")
            return EXIT_FENCED
        finally:
            self.archiver.close()
        # What is left comes again: nothing is complete before it is written.
        logger.info("stopped", left_in_log=self.archiver.pending, **self.archiver.counts)
        return 0

    def guarded_step(self, *, draining: bool = False) -> None:
        self.health.progress()
        self.patiently(lambda: self.archiver.step(draining=draining), TROUBLE_PAUSE_S)


if __name__ == "__main__":
    raise SystemExit(main())
