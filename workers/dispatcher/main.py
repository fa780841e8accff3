"""The dispatcher process: put together here, run until SIGTERM, drained, closed in order."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from contextlib import closing, suppress

from infra.catalogue import Catalogue
from infra.embedded import announce_ready
from infra.eventlog import EventLog, Fenced
from infra.eventlog.open import connect_log
from infra.fleet import DispatcherBeat, Fleet, LaneSnapshot
from infra.health import Health, serve_health
from infra.job_view import JobView
from infra.logs import get_logger
from infra.objects import connect_objects
from infra.preconditions import preconditions
from infra.redis_client import connect_redis, connect_view
from infra.settings import Settings
from infra.tasks import Mailboxes, make_app
from schemas.errors import InvalidJob, Transient
from schemas.jobs import read_cancel
from schemas.topics import CONTROL, TOPIC_BY_NAME
from workers.dispatcher.admit import Admitter
from workers.dispatcher.batching import Batcher
from workers.dispatcher.breaker import Breaker
from workers.dispatcher.fairness import LaneClock
from workers.dispatcher.intake import TOPICS, Intake
from workers.dispatcher.janitor import Janitor
from workers.dispatcher.leases import Leases
from workers.dispatcher.loop import Dispatcher
from workers.dispatcher.memory import JobMemory
from workers.dispatcher.outcomes import Outcomes, RetryPolicy
from workers.dispatcher.ownership import MARGIN_S, Ownership
from workers.dispatcher.residents import Residents
from workers.dispatcher.settle import Settlement
from workers.dispatcher.view_writer import ViewTtl, ViewWriter
from workers.dispatcher.waiting import Waiting
from workers.process import EXIT_FENCED, PatientProcess, serve

GROUP = "dispatcher"
BEAT_EVERY_S = 1.0
TROUBLE_PAUSE_S = 0.2
DRAIN_S = 1.0
"""What is out for longer is adopted by this slot's next process, or by whoever gets its records."""

logger = get_logger("dispatcher")


def main() -> int:
    return serve("dispatcher", run)


def run(settings: Settings, stop: threading.Event) -> int:
    preconditions(settings)
    with closing(connect_log(settings)) as log:
        process = Process(settings, log)
        announce_ready(settings, "dispatcher")
        return process.run(stop)


class Process(PatientProcess):
    """The dispatcher with what surrounds its loop: trouble, sign of life, retention, drain."""

    def __init__(self, settings: Settings, log: EventLog) -> None:
        options = settings.dispatcher
        redis = connect_redis(settings)
        self.settings = settings
        self.health = Health()
        serve_health(settings, self.health)
        self.log = log
        self.fleet = Fleet(redis)
        self.memory = JobMemory(options.dedupe_window_s, options.dedupe_jobs)
        recall_cancels(self.memory, log)
        self.control = log.follow([CONTROL], time.time() - MARGIN_S)
        # Joining fences the dispatcher before this one in its slot; only then is what it wrote complete.
        self.consumer = log.consumer(GROUP, TOPICS, window=options.window)
        self.batcher = Batcher(LaneClock(), options.batch_bytes)
        self.leases = Leases(options.lease_s)
        view = JobView(connect_view(settings), options.slot)
        self.view_writer = ViewWriter(view, log, ViewTtl(settings.view_ttl_s, settings.view_jobs))
        self.outcomes = Outcomes(
            self.consumer,
            self.memory,
            self.view_writer,
            RetryPolicy(options.retry_base_s, options.retry_cap_s),
        )
        self.breaker = Breaker(settings.breaker)
        waiting = Waiting()
        self.settlement = Settlement(
            self.leases, self.memory, self.batcher, self.outcomes, self.breaker, waiting
        )
        objects = connect_objects(settings)
        catalogue = Catalogue(objects)
        self.janitor = Janitor(log, objects)
        tenants = settings.tenants
        admitter = Admitter(
            catalogue.resolve,
            self.memory,
            options.max_deadline_s,
            keys=tenants.secrets() if tenants.require_proof else None,
        )
        ownership = Ownership(
            self.consumer,
            log,
            self.fleet,
            self.memory,
            self.batcher,
            self.leases,
            self.outcomes,
            self.view_writer,
            options.dedupe_window_s,
        )
        self.intake = Intake(
            self.consumer,
            self.control,
            ownership,
            admitter,
            self.memory,
            self.batcher,
            self.leases,
            self.outcomes,
            self.breaker,
            waiting,
            options.window_bytes,
        )
        self.dispatcher = Dispatcher(
            slot=options.slot,
            lease_s=options.lease_s,
            fleet=self.fleet,
            mailboxes=Mailboxes(make_app(settings)),
            view_writer=self.view_writer,
            intake=self.intake,
            batcher=self.batcher,
            leases=self.leases,
            settlement=self.settlement,
            outcomes=self.outcomes,
            residents=Residents(self.fleet),
        )
        self.started_at = time.time()
        self._beat_at = 0.0

    def run(self, stop: threading.Event) -> int:
        threading.Thread(target=self.janitor.run, args=(stop,), name="janitor", daemon=True).start()
        try:
            self.health.ready = True
            while not stop.is_set():
                self.guarded_step(draining=False)
                self.housekeep()
            self.health.ready = False
            drain_until = time.monotonic() + DRAIN_S
            while (self.leases or self.outcomes) and time.monotonic() < drain_until:
                self.guarded_step(draining=True)
        except Fenced:
            logger.error("fenced", action="another dispatcher took over; this one ends")
            return EXIT_FENCED
        finally:
            self.view_writer.close()
            self.consumer.close()
            self.control.close()
        self.sign_off()
        logger.info("stopped", left_running=len(self.leases))
        return 0

    def guarded_step(self, *, draining: bool) -> None:
        self.patiently(lambda: self.dispatcher.step(draining=draining), TROUBLE_PAUSE_S)

    def housekeep(self) -> None:
        self.health.progress()
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + BEAT_EVERY_S
            try:
                self.fleet.show_dispatcher(self.beat())
            except Transient:
                return

    def sign_off(self) -> None:
        with suppress(Transient):
            self.dispatcher.forget_answered()
            self.view_writer.sign_off()
            self.fleet.sign_off_dispatcher(self.settings.dispatcher.slot)

    def beat(self) -> DispatcherBeat:
        now = time.time()
        by_lane = self.batcher.summary()
        return DispatcherBeat(
            slot=self.settings.dispatcher.slot,
            pid=os.getpid(),
            started_at=self.started_at,
            at=now,
            waiting={
                lane: LaneSnapshot(len(jobs), now - min(job.job.submitted_at for job in jobs))
                for lane, jobs in by_lane.items()
            },
            models=dict(Counter(job.model for job in self.batcher)),
            delayed=self.intake.delayed,
            running=len(self.leases),
            running_jobs=sum(len(lease.held) for lease in self.leases),
            ended=dict(self.outcomes.counts),
            redispatched=self.settlement.redispatched,
            held_back={
                f"{key.model}/{key.version} of {key.tenant}": at
                for key, at in self.breaker.open_keys().items()
            },
            trouble=self.trouble,
        )


def recall_cancels(memory: JobMemory, log: EventLog) -> None:
    """Read back from the log what an earlier life knew of cancel requests."""
    for record in log.read([CONTROL], time.time() - TOPIC_BY_NAME[CONTROL].retention_s):
        with suppress(InvalidJob):
            if job_id := read_cancel(record.key, record.headers, record.value):
                memory.cancel(job_id)


if __name__ == "__main__":
    raise SystemExit(main())
