"""What a dispatcher knows of jobs: those it holds open, those that ended under a key, those to be cancelled.

The event log is the truth behind all of it; after a restart it is read again from there. Every part is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
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
    def model(self) -> str:
        """`name/version`, as workers name what they have loaded."""
        return f"{self.card.name}/{self.card.version}"

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
        self.open: dict[str, OpenJob] = {}
        self.held_bytes = 0

    def hold(self, job: OpenJob) -> None:
        self.open[job.job.id] = job
        self.held_bytes += job.inline_bytes

    def moved(self, job: Job, now: float) -> None:
        """The job is no longer in hand; the retry topic has it, and its key stays taken."""
        self._let_go(job.id)
        if is_keyed(job):
            self.remember(job.id, fingerprint_of(job), job.replay, now)

    def ended(self, job: Job, now: float) -> None:
        self.moved(job, now)
        self._cancels.pop(job.id, None)

    def lost(self, positions: Collection[Position]) -> list[OpenJob]:
        """Forget the open jobs at these positions, which are another dispatcher's now; returns them."""
        lost = [job for job in self.open.values() if job.at in positions]
        for job in lost:
            self._let_go(job.job.id)
        return lost

    def remember(self, job_id: str, fingerprint: str, replay: str | None, at: float) -> None:
        """A job that must not run again: under its idempotency key, or as this redrive of a dead letter."""
        identities = {_identity(job_id, replay), *([job_id] if fingerprint else [])}
        for identity in identities:
            self._keys[identity] = (fingerprint, at)
            self._keys.move_to_end(identity)
        while len(self._keys) > self._keys_most:
            self._keys.popitem(last=False)

    def forget(self, job: Job) -> None:
        """The job was remembered, but its outcome could not be written."""
        self._keys.pop(_identity(job.id, job.replay), None)

    def known_as(self, job: Job, now: float) -> str | None:
        """The fingerprint under which this job's id is in use, NO_KEY for one without a key; None if it is new."""
        if held := self.open.get(job.id):
            return fingerprint_of(held.job)
        replayed = self._remembered(_identity(job.id, job.replay), now)
        if replayed is not None or job.replay is None:
            return replayed
        of_key = self._remembered(job.id, now)
        # A redrive is new, unless the key stands for other work: that keeps the id.
        return of_key if of_key != fingerprint_of(job) else None

    def _remembered(self, identity: str, now: float) -> str | None:
        known, at = self._keys.get(identity, (None, 0.0))
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


def is_keyed(job: Job) -> bool:
    """Whether the job is one that must be recognised when it comes again after its end."""
    return job.key is not None or job.replay is not None


def fingerprint_of(job: Job) -> str:
    return job.fingerprint if job.key is not None else NO_KEY


def _identity(job_id: str, replay: str | None) -> str:
    return job_id if replay is None else f"{job_id} {replay}"
