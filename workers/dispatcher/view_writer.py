"""Keeps the job view up with the results topic, and rebuilds it when Redis lost its memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice

from infra.eventlog import EventLog, Record
from infra.job_view import Ended, JobView
from infra.logs import get_logger
from schemas.errors import Transient
from schemas.jobs import Job
from schemas.results import encode_outcome, outcome_of
from schemas.topics import RESULTS

REBUILD_CHUNK = 500
MARGIN_S = 2.0
LOOK_EVERY_S = 1.0
RATE_WINDOW_S = 10.0
SHORTEST_S = 60

logger = get_logger("dispatcher.view")


class ViewTtl:
    """How long an outcome is shown: longest_s, or less while jobs end so fast that more than most_jobs
    would gather in Redis. The log answers for those that are no longer shown."""

    def __init__(self, longest_s: int, most_jobs: int) -> None:
        self.longest_s = longest_s
        self.seconds = longest_s
        self._most_jobs = most_jobs
        self._counted = 0
        self._since = 0.0

    def count(self, ended: int, now: float) -> None:
        if now - self._since >= RATE_WINDOW_S:
            rate = self._counted / (now - self._since)
            fits_s = self._most_jobs / rate if rate else self.longest_s
            self.seconds = int(min(self.longest_s, max(SHORTEST_S, fits_s)))
            self._counted, self._since = 0, now
        self._counted += ended


class ViewWriter:
    """Never raises for Redis: outcomes are safe in the log, and the view catches up when it is back.

    behind: whether it has to. losses: how often Redis was found without its memory.
    """

    def __init__(self, view: JobView, log: EventLog, ttl: ViewTtl) -> None:
        self._view = view
        self._log = log
        self._ttl = ttl
        self._replay: Generator[Record, None, None] | None = None
        self._began_at = 0.0
        self._marks: set[int] = set()
        self._marked = False
        self._looked_at = 0.0
        self.behind = True
        self.losses = 0

    def show(self, ended: Sequence[Ended], now: float) -> None:
        """Show outcomes that the log already has."""
        self._ttl.count(len(ended), now)
        try:
            self._looked_at = now
            remembers = self._view.ended(ended, self._ttl.seconds, None if self.behind else now)
        except Transient:
            self._fall_behind()
            return
        if not remembers:
            self._fall_behind()

    def running(self, jobs: Sequence[Job]) -> None:
        """Show jobs as being with a worker."""
        try:
            shown = [(job.id, encode_outcome(outcome_of(job, "running"))) for job in jobs]
            self._view.show(shown, self._ttl.seconds)
        except Transient:
            self._fall_behind()

    def look_back(self) -> None:
        """Show what another dispatcher has written and, being dead, may not have shown."""
        self._fall_behind()

    def sign_off(self) -> None:
        """Leave no mark behind that a later rebuild would begin at."""
        if not self.behind:
            self._view.sign_off()

    def catch_up(self, now: float) -> None:
        """Look whether the view still has its memory; one bounded step of a rebuild if it has not."""
        if not self.behind and now - self._looked_at >= LOOK_EVERY_S:
            self.show((), now)
        if not self.behind:
            return
        try:
            if self._replay is None:
                self._begin(now)
            self._step()
        except Transient:
            self._fall_behind()

    def close(self) -> None:
        """End a rebuild that is under way: what it reads with must be closed while the process still runs."""
        if self._replay is not None:
            self._replay.close()
            self._replay = None

    def _fall_behind(self) -> None:
        self.behind = True
        self.close()

    def _begin(self, now: float) -> None:
        marks = self._view.marks()
        since = now - self._ttl.seconds
        if marks and (self._view.writer in marks or not self._marked):
            since = max(since, min(marks.values()) - MARGIN_S)
        else:
            logger.warning("view_lost", action="rebuild from the results topic")
            self.losses += 1
        if self._view.writer not in marks:
            self._view.rebuild_from(since)
        self._marks = {*marks, self._view.writer}
        self._marked = True
        self._began_at = now
        self._replay = self._log.read([RESULTS], since)

    def _step(self) -> None:
        assert self._replay is not None
        records = list(islice(self._replay, REBUILD_CHUNK))
        self._view.show([(record.key, record.value) for record in records], self._ttl.seconds)
        if len(records) < REBUILD_CHUNK:
            self._replay = None
            # The marks of _begin must still stand, or Redis was emptied once more meanwhile.
            self.behind = not self._view.move_marks(self._marks, self._began_at)
            self._looked_at = self._began_at
