"""Waiting for jobs to end: told by Redis, looking into the job view now and then, and into the log itself
when the view keeps silent (its memory is bounded, and Redis may lose all of it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from infra.eventlog import EventLog
from infra.job_view import JobView, Notices
from producers.job_search import find_ended
from schemas.errors import Transient
from schemas.jobs import submitted_near
from schemas.results import Outcome

LOOK_EVERY_S = 1.0
LOOK_AT_ONCE = 1000
SEARCH_AFTER_S = 15.0
SEARCH_EVERY_S = 30.0
AWAY_S = 30.0
"""How long Redis may be away before a wait gives up; the embedded stack has it back in a second."""
AWAY_PAUSE_S = 0.25
IDLE_EARS = 4


class Ears:
    """Open channels of one client, used by one wait at a time each; a few are kept for the next."""

    def __init__(self, open_ear: Callable[[], Notices]) -> None:
        self._open_ear = open_ear
        self._idle: list[Notices] = []
        self._closed = False

    def take(self) -> Notices:
        """Raises Transient."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._open_ear()

    def give_back(self, ear: Notices) -> None:
        if len(self._idle) < IDLE_EARS and not self._closed:
            self._idle.append(ear)
        else:
            ear.close()

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class Waiter:
    """For one wait. ears: on the channel that the jobs were submitted with."""

    def __init__(self, view: JobView, log: EventLog, ears: Ears) -> None:
        self._view = view
        self._log = log
        self._ears = ears
        self._ear: Notices | None = None
        self._away_since: float | None = None

    def ended(self, job_ids: Iterable[str], timeout_s: float) -> Iterator[Outcome]:
        """Each job's outcome, once, in the order they are seen to end.

        Raises TimeoutError naming how many are left, and Transient if Redis stays away for AWAY_S.
        """
        try:
            yield from self._ended(dict.fromkeys(job_ids), timeout_s)
        finally:
            if self._ear:
                self._ears.give_back(self._ear)

    def _ended(self, waiting: dict[str, None], timeout_s: float) -> Iterator[Outcome]:
        now = time.monotonic()
        deadline = now + timeout_s
        look_at = now
        search_at = now if any(map(_is_old, waiting)) else now + SEARCH_AFTER_S
        told: Sequence[str] = ()
        if waiting:
            self._listen(0)  # the ear must be open before the first look
        while waiting:
            now = time.monotonic()
            if now >= look_at:
                told, look_at = list(waiting), now + LOOK_EVERY_S
            yield from _taken(waiting, self._look(told))
            if waiting and now >= search_at:
                yield from _taken(waiting, find_ended(self._log, waiting))
                search_at = time.monotonic() + SEARCH_EVERY_S
            if waiting:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise _too_late(len(waiting), timeout_s)
                told = [id_ for id_ in self._listen(min(left_s, LOOK_EVERY_S)) if id_ in waiting]

    def _look(self, job_ids: Sequence[str]) -> Iterator[Outcome]:
        for start in range(0, len(job_ids), LOOK_AT_ONCE):
            try:
                found = self._view.get(job_ids[start : start + LOOK_AT_ONCE])
            except Transient as error:
                self._away(error)
                return
            self._away_since = None
            yield from (outcome for outcome in found if outcome is not None and outcome.ended)

    def _listen(self, timeout_s: float) -> list[str]:
        try:
            if self._ear is None:
                self._ear = self._ears.take()
            return self._ear.wait(timeout_s)
        except Transient as error:
            self._away(error)
            time.sleep(min(timeout_s, AWAY_PAUSE_S))
            return []

    def _away(self, error: Transient) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since > AWAY_S:
            raise error


def _taken(waiting: dict[str, None], outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    for outcome in outcomes:
        if outcome.job_id in waiting:
            del waiting[outcome.job_id]
            yield outcome


def _is_old(job_id: str) -> bool:
    made_at = submitted_near(job_id)
    return made_at is not None and time.time() - made_at > SEARCH_AFTER_S


def _too_late(left: int, timeout_s: float) -> TimeoutError:
    return TimeoutError(
        f"{left} jobs had not ended after {timeout_s:g} s; they go on. See `headrace jobs explain JOB`."
    )
