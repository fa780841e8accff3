"""The inference worker process: warm up, then ask for work; on SIGTERM drain, then close."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
from celery import signals

from infra.catalogue import Catalogue
from infra.embedded import announce_ready
from infra.embedded.processes import age_s
from infra.fleet import Fleet, WorkerBeat, mailbox
from infra.health import Health, serve_health
from infra.logs import configure_logs, get_logger
from infra.machine import available_cpus
from infra.objects import connect_objects
from infra.redis_client import connect_redis
from infra.settings import Settings, load_settings
from infra.tasks import make_app
from pipelines.engines import open_engines
from schemas.errors import DEVICE_FAILED, InferenceFailed, Transient
from workers.inference.hand import Hand
from workers.inference.hearing import Hearing
from workers.inference.models import Models
from workers.inference.stages import Stages
from workers.inference.start import Steps
from workers.inference.task import BatchRunner
from workers.inference.watchdog import EXIT_OVERRUN, Watchdog
from workers.process import EXIT_FAILED, exit_code

LOAD_OVERRAN = InferenceFailed(
    "load_overran",
    "Expected the model to be loaded within HEADRACE_WORKER__LOAD_S, it was not; allow for more, or see the"
    " worker's log for the step that it hangs in.",
)
BEAT_EVERY_S = 1.0
NO_LEASE_S = 10.0
JOIN_S = 5.0

logger = get_logger("worker")


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = load_settings()
    configure_logs(settings.worker.name, settings.log_level)
    start = Steps(age_s=age_s(os.getpid()))
    start.ended("imports")
    return exit_code(lambda: Worker(settings, start).run())


class Worker:
    """start: of this process, whose first steps have ended."""

    def __init__(self, settings: Settings, start: Steps) -> None:
        options = settings.worker
        self.settings = settings
        self.fleet = Fleet(connect_redis(settings))
        self.objects = connect_objects(settings)
        executors = options.executors or available_cpus()
        self.hand = Hand(options.name, options.slots)
        self.models = Models(
            options,
            Catalogue(self.objects),
            open_engines(settings, self.objects),
            self.on_device_failed,
        )
        self.runner = BatchRunner(
            self.fleet,
            self.hand,
            self.models.resident,
            Stages(self.objects, executors),
            self.on_device_failed,
        )
        self.watchdog = Watchdog(
            self.hand, self.models.resident, options.load_s, self.on_load_overran
        )
        self.hearing = Hearing()
        self.celery: Any = None
        self.health = Health()
        self.started_at = time.time() - start.total_s
        self.start = start
        self.cold_start_s = 0.0
        self.exit_code = 0
        self._stopped = threading.Event()
        self._beating = threading.Thread(target=self.beat_forever, name="beat", daemon=True)
        start.ended("connect")

    def run(self) -> int:
        """Warm up, then serve until SIGTERM. Returns the exit code. Raises Transient("device_failed")."""
        serve_health(self.settings, self.health)
        self._thread("watchdog", self.watchdog.look_until)
        self.models.warm_up(self.start)
        app = make_app(self.settings)
        self.runner.register(app)
        signals.worker_ready.connect(self.on_ready, weak=False)
        signals.worker_shutting_down.connect(self.on_drain, weak=False)
        self.celery = app.Worker(
            hostname=self.settings.worker.name,
            pool="threads",
            concurrency=self.hand.capacity,
            queues=[mailbox(self.settings.worker.name)],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel="WARNING",
            quiet=True,
        )
        self.celery.start()
        self.close()
        return self.exit_code

    def on_ready(self, **_: Any) -> None:
        """Celery listens: clear away what an earlier life offered, then ask for work."""
        self.start.ended("listen")
        self.cold_start_s = self.start.total_s
        self.health.ready = True
        self._beating.start()
        self._thread("versions", self.models.keep_current_until)
        logger.info(
            "ready",
            ready_s=self.cold_start_s,
            steps=list(self.start.seconds.items()),
            models=self.models.resident.names(),
        )
        announce_ready(
            self.settings, self.settings.worker.name, models=self.models.resident.names()
        )

    def _thread(self, name: str, run: Callable[[threading.Event], None]) -> None:
        """Until the process ends."""
        threading.Thread(target=run, args=(self._stopped,), name=name, daemon=True).start()

    def on_device_failed(self) -> None:
        """A process that lost its GPU does not get it back."""
        self.end(EXIT_FAILED, DEVICE_FAILED)

    def on_load_overran(self, model: str) -> None:
        """Its thread hangs for good. The jobs that wait for it are charged, those of other models are not."""
        if self.hand.closed:
            return  # it ends anyway
        logger.error("load_overran", model=model, load_s=self.settings.worker.load_s)
        if not self.health.ready:
            os._exit(EXIT_OVERRUN)
        self.hand.close()
        self.runner.fail(model, LOAD_OVERRAN)
        self.end(EXIT_OVERRUN, LOAD_OVERRAN.code)

    def end(self, exit_code: int, why: str) -> None:
        """Drain and end, for the supervisor to start another."""
        if not self.exit_code:
            self.exit_code = exit_code
            self.hand.close()
            logger.error(why, action="the worker ends, to be started anew")
            os.kill(os.getpid(), signal.SIGTERM)

    def on_drain(self, **_: Any) -> None:
        """SIGTERM: offer nothing more, finish what is in hand; what does not end in time goes back unrun."""
        self.hand.close()
        self.health.ready = False
        logger.info("draining", batches=len(self.hand.held()))
        threading.Thread(target=self.end_drain, name="drain", daemon=True).start()

    def end_drain(self) -> None:
        try:
            self.fleet.clear_slots(self.hand.worker)
        except Transient as error:
            logger.warning("slots_not_withdrawn", error=error.message)
        if self._stopped.wait(self.settings.worker.drain_s):
            return
        for held in self.hand.held():
            try:
                self.runner.give_back(held.batch)
            except Transient as error:
                logger.warning("batch_not_given_back", batch=held.batch.id, error=error.message)
        if not self._stopped.is_set():
            logger.warning("drain_over", left=len(self.hand.held()))
            os._exit(self.exit_code)

    def beat_forever(self) -> None:
        cleared = False
        while not self._stopped.is_set():
            self.health.progress()
            try:
                if not cleared:
                    self.fleet.clear_slots(self.hand.worker)
                    cleared = True
                self.beat()
            except Transient as error:
                logger.warning("beat_missed", error=error.message)
            self._stopped.wait(min(BEAT_EVERY_S, self.lease_s() / 4))

    def beat(self) -> None:
        """Sign of life, leases renewed, lost slots offered anew."""
        held = self.hand.held()
        self.fleet.beat(self.describe(), [h.batch.id for h in held], int(self.lease_s() * 1000))
        tokens = self.hand.offers()
        if tokens:
            self.hand.missing(tokens, self.fleet.offered(tokens))
        self.runner.offer_slots()
        self.hear()

    def hear(self) -> None:
        """See that what was sent to this worker is taken."""
        free = len(self.hand.held()) < self.hand.capacity
        unread = self.fleet.unread(self.hand.worker)
        if self.hearing.is_deaf(unread, self.runner.taken, free=free):
            logger.warning("mailbox_not_heard", unread=unread, action="connect anew")
            self.celery.consumer.hub.call_soon(_lose_connection)

    def lease_s(self) -> float:
        """The shortest lease in hand."""
        return min((held.batch.lease_s for held in self.hand.held()), default=NO_LEASE_S)

    def describe(self) -> WorkerBeat:
        return WorkerBeat(
            worker=self.hand.worker,
            life=self.hand.life,
            pid=os.getpid(),
            started_at=self.started_at,
            ready=self.health.ready,
            draining=self.hand.closed,
            slots=self.hand.capacity,
            batches=[held.batch.id for held in self.hand.held()],
            engines=self.models.resident.names(),
            memory_bytes=psutil.Process().memory_info().rss,
            jobs_done=self.runner.jobs_done,
            start=self.start.seconds,
            cold_start_s=self.cold_start_s,
        )

    def close(self) -> None:
        self._stopped.set()
        if self._beating.is_alive():
            self._beating.join(JOIN_S)  # or its last beat would sign on again
        if not self.exit_code:  # a device that failed may not even answer
            self.models.resident.close()
        try:
            self.fleet.sign_off(self.hand.worker)
        except Transient as error:
            logger.warning("sign_off_missed", error=error.message)
        logger.info("stopped", jobs_done=self.runner.jobs_done)


def _lose_connection() -> None:
    """In Celery's loop, which then begins anew as after any loss."""
    raise ConnectionResetError("the mailbox is not heard any more")


if __name__ == "__main__":
    raise SystemExit(main())
