"""What a dispatcher knows of jobs: those it holds open, those that ended under a key, those to be cancelled.

The event log is the truth behind all of it; after a restart it is read again from there. Every part is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from infra.eventlog import Position
from schemas.jobs import Job
from schemas.models import ModelCard
from schemas.topics import Lane

NO_KEY = ""
CANCELS_MOST = 100_000


@dataclass(slots=True, eq=False)
class OpenJob:
    """A job in hand, from admission to its one outcome.

    job: with its version pinned. lane: whose credit it uses. order: by admission.
    admitted_at: seconds since the epoch, by this clock. dispatches: batches it was in.
    """

    job: Job
    at: Position
    card: ModelCard
    lane: Lane
    order: int
    admitted_at: float
    dispatches: int = 0

    @property
    def inline_bytes(self) -> int:
        return len(self.job.payload.data or b"")

    @property
    def group(self) -> tuple[str, int, int]:
        """Jobs of one group may share a batch: same version and, for texts, about the same length."""
        bucket = self.job.payload.size_bytes.bit_length() if self.card.modality == "text" else 0
        return (self.card.name, self.card.version, bucket)


class JobMemory:
    """keys_window_s, keys_most: how long, and how many, ended jobs with an idempotency key are remembered."""

    def __init__(self, keys_window_s: float, keys_most: int) -> None:
        self._keys_window_s = keys_window_s
        self._keys_most = keys_most
        self._keys: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._cancels: OrderedDict[str, None] = OrderedDict()
        self._moved: dict[str, str] = {}
        self.open: dict[str, OpenJob] = {}
        self.held_bytes = 0

    def hold(self, job: OpenJob) -> None:
        self.open[job.job.id] = job
        self.held_bytes += job.inline_bytes

    def moved(self, job: Job) -> None:
        """The job is no longer in hand; the retry topic has it, and its key stays taken."""
        self._let_go(job.id)
        if job.key is not None:
            self._moved[job.id] = job.fingerprint

    def returned(self, job_id: str) -> None:
        """The job came back from the retry topic."""
        self._moved.pop(job_id, None)

    def ended(self, job: Job, now: float) -> None:
        self._let_go(job.id)
        self._cancels.pop(job.id, None)
        if job.key is not None:
            self.remember_key(job.id, job.fingerprint, now)

    def remember_key(self, job_id: str, fingerprint: str, at: float) -> None:
        self._keys[job_id] = (fingerprint, at)
        self._keys.move_to_end(job_id)
        while len(self._keys) > self._keys_most:
            self._keys.popitem(last=False)

    def known_as(self, job_id: str, now: float) -> str | None:
        """The fingerprint under which this id is in use, NO_KEY for one without a key; None if it is new."""
        if job := self.open.get(job_id):
            return job.job.fingerprint if job.job.key is not None else NO_KEY
        if fingerprint := self._moved.get(job_id):
            return fingerprint
        known, at = self._keys.get(job_id, (None, 0.0))
        return known if now - at <= self._keys_window_s else None

    def cancel(self, job_id: str) -> None:
        self._cancels[job_id] = None
        while len(self._cancels) > CANCELS_MOST:
            self._cancels.popitem(last=False)

    def is_cancelled(self, job_id: str) -> bool:
        return job_id in self._cancels

    def _let_go(self, job_id: str) -> None:
        if job := self.open.pop(job_id, None):
            self.held_bytes -= job.inline_bytes
