"""Keeps the job view up with the results topic, and rebuilds it when Redis lost its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from infra.eventlog import EventLog, Record
from infra.job_view import Ended, JobView
from infra.logs import get_logger
from schemas.errors import Transient
from schemas.topics import RESULTS

REBUILD_CHUNK = 500
MARGIN_S = 2.0

logger = get_logger("dispatcher.view")


class ViewWriter:
    """Never raises for Redis: outcomes are safe in the log, and the view catches up when it is back."""

    def __init__(self, view: JobView, log: EventLog, ttl_s: int) -> None:
        self._view = view
        self._log = log
        self._ttl_s = ttl_s
        self._replay: Iterator[Record] | None = None
        self._replay_from = 0.0
        self.behind = True

    def show(self, ended: Sequence[Ended], now: float) -> None:
        """Show outcomes that the log already has."""
        try:
            remembers = self._view.ended(ended, None if self.behind else now)
        except Transient:
            self._fall_behind()
            return
        if not remembers:
            logger.warning("view_lost", action="rebuild from the results topic")
            self._fall_behind()

    def catch_up(self, now: float) -> None:
        """One bounded step of a rebuild, if one is needed."""
        if not self.behind:
            return
        try:
            if self._replay is None:
                self._begin(now)
            self._step()
        except Transient:
            self._fall_behind()

    def _fall_behind(self) -> None:
        self.behind = True
        self._replay = None

    def _begin(self, now: float) -> None:
        since = self._view.complete_to()
        since = now - self._ttl_s if since is None else since - MARGIN_S
        self._view.ended((), since)
        self._replay_from = now
        self._replay = self._log.read([RESULTS], since)

    def _step(self) -> None:
        assert self._replay is not None
        records = list(islice(self._replay, REBUILD_CHUNK))
        self._view.restore([(record.key, record.value) for record in records])
        if len(records) < REBUILD_CHUNK:
            self._replay = None
            # The mark that _begin set must still stand, or Redis was emptied once more meanwhile.
            self.behind = not self._view.ended((), self._replay_from)
