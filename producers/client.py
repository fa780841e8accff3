"""The client: submit, wait, iterate, cancel. A job is accepted once `submit` returns."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import msgspec

from infra.catalogue import Catalogue
from infra.eventlog import EventLog, NewRecord
from infra.eventlog.open import connect_log
from infra.fleet import Fleet
from infra.job_view import JobView
from infra.lake import find_in_lake
from infra.objects import ObjectStore, connect_objects
from infra.redis_client import Redis, connect_redis, connect_view
from infra.settings import Settings, load_settings
from producers.deadletters import DeadLetters
from producers.job_search import find_job
from producers.payloads import make_payload
from producers.waiting import Ears, Waiter
from schemas.admission import check_deadline, check_limits
from schemas.errors import InvalidJob, JobFailed, Transient
from schemas.jobs import (
    DEFAULT_DEADLINE_S,
    JOB_ID,
    KEY_LIMIT_CHARS,
    PRIORITIES,
    TENANT,
    Job,
    cancel_headers,
    job_headers,
    job_value,
    new_job_id,
    new_traceparent,
    plain_params,
)
from schemas.models import ModelCard
from schemas.proof import TenantKeys, signed
from schemas.results import NO_ANSWER, Outcome, StageTimes
from schemas.topics import CONTROL, DAY_S, LANES, jobs_topic

if TYPE_CHECKING:
    from producers.payloads import Submittable

APPEND_MOST = 500
WAIT_S = 300.0
CONFLICT = "idempotency_conflict"


@dataclass(frozen=True, slots=True)
class Result:
    """A job that succeeded. answer: what the model's postprocessing says; it always has a `type`."""

    job_id: str
    model: str
    version: int
    answer: dict[str, Any]
    attempts: int
    times: StageTimes

    @property
    def label(self) -> str:
        """The most probable label of a classification."""
        return str(self.answer["label"])

    @property
    def probability(self) -> float:
        return float(self.answer["probability"])

    @property
    def text(self) -> str:
        """The text of a transcription."""
        return str(self.answer["text"])


@dataclass(frozen=True, slots=True)
class JobHandle:
    """A job that was accepted. fingerprint: of the work, when it has an idempotency key."""

    id: str
    client: Client = field(repr=False, compare=False)
    fingerprint: str | None = None

    def result(self, timeout_s: float = WAIT_S) -> Result:
        """Wait for the result. Raises JobFailed, InvalidJob (idempotency_conflict) and what `wait` raises."""
        return self.client.result_of(self.wait(timeout_s))

    def wait(self, timeout_s: float = WAIT_S) -> Outcome:
        """Wait until the job has ended, however it did.

        Raises TimeoutError, and Transient when Redis stays away.
        """
        return next(self.client.outcomes([self], timeout_s))

    def status(self) -> Outcome:
        return self.client.status(self.id)

    def cancel(self) -> None:
        self.client.cancel(self.id)


class JobOptions(TypedDict, total=False):
    """version: the newest by default. tier: premium, standard, basic or bulk; the model's own by default.
    priority: 0 to 9, higher first, within the tier. deadline_s: from now. params: for the model's steps.
    content_type: a hint; the bytes decide."""

    version: int | None
    tier: str | None
    priority: int
    deadline_s: float | None
    params: dict[str, Any] | None
    content_type: str | None


class Client:
    """Talks to the stack of the settings: by default the embedded one of `headrace up`.

    Safe to share between threads. Opens connections on first use.
    """

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        tenant: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        overrides = {"data_dir": Path(data_dir)} if data_dir is not None else {}
        self.settings = settings or load_settings(**overrides)
        self.tenant = self.settings.tenant if tenant is None else tenant
        if not TENANT.fullmatch(self.tenant):
            raise InvalidJob(
                "tenant_invalid",
                f"Expected a tenant matching {TENANT.pattern}, came {self.tenant!r}.",
            )
        self.id = secrets.token_hex(8)

    # ── submit ───────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        model: str,
        payload: Submittable,
        *,
        key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> JobHandle:
        """Submit one job; it is accepted, and will not be lost, when this returns.

        payload: bytes, text (str), a file (pathlib.Path), a numpy array, or a Ref to an object of this tenant.
        key: submitting the same work twice under one key makes one job. options: see JobOptions.
        Raises InvalidJob with a code, and Transient when the log or the object store cannot take it now.
        """
        job = self._job(model, payload, key, options)
        self._append([job])
        return self._handle(job)

    def submit_many(
        self, model: str, payloads: Iterable[Submittable], **options: Unpack[JobOptions]
    ) -> list[JobHandle]:
        """Submit a job per payload, with the options of `submit`. Raises at the first bad payload;
        the jobs before it, by whole groups of APPEND_MOST, were accepted. For streams: `submit_each`."""
        return list(self.submit_each(model, payloads, **options))

    def submit_each(
        self, model: str, payloads: Iterable[Submittable], **options: Unpack[JobOptions]
    ) -> Iterator[JobHandle]:
        """Like submit_many, but lazily: handles come out as groups are accepted, and nothing is kept."""
        group: list[Job] = []
        for payload in payloads:
            group.append(self._job(model, payload, None, options))
            if len(group) == APPEND_MOST:
                yield from self._accept(group)
                group = []
        yield from self._accept(group)

    # ── results ──────────────────────────────────────────────────────────────────────────────────

    def results(
        self, jobs: Iterable[JobHandle], timeout_s: float = WAIT_S
    ) -> Iterator[Result | JobFailed]:
        """Each job's result as it arrives; a job that ended without one gives its JobFailed, not raised."""
        for outcome in self.outcomes(jobs, timeout_s):
            try:
                yield self.result_of(outcome)
            except JobFailed as failure:
                yield failure
            except InvalidJob as conflict:
                yield JobFailed(conflict.code, conflict.message)

    def outcomes(
        self, jobs: Iterable[JobHandle | str], timeout_s: float = WAIT_S
    ) -> Iterator[Outcome]:
        """Each job's outcome as it ends, in that order. Raises as `JobHandle.wait`."""
        handles = {handle.id: handle for handle in map(self._as_handle, jobs)}
        waiter = Waiter(self._view, self.log, self._ears)
        for outcome in waiter.ended(handles, timeout_s):
            yield _checked(outcome, handles[outcome.job_id])

    def result_of(self, outcome: Outcome) -> Result:
        """The result of an outcome, fetched if it is an object. Raises JobFailed or InvalidJob if there is none."""
        if outcome.code == CONFLICT:
            raise InvalidJob(CONFLICT, outcome.message or "")
        if outcome.status != "succeeded":
            raise JobFailed(
                outcome.code or outcome.status,
                f"Job {outcome.job_id} ended as {outcome.status}: {outcome.message or 'no result'}",
            )
        raw = self._objects.fetch(outcome.ref) if outcome.ref else bytes(outcome.answer)
        return Result(
            outcome.job_id,
            outcome.model,
            outcome.version or 0,
            msgspec.json.decode(raw),
            outcome.attempts,
            outcome.times or StageTimes(),
        )

    def status(self, job_id: str) -> Outcome:
        """How the job stands now. Raises InvalidJob (job_unknown)."""
        _check_id(job_id)
        try:
            (seen,) = self._view.get([job_id])
        except Transient:
            seen = None
        seen = seen or find_job(self.log, job_id) or self._find_in_lake(job_id)
        if seen is None:
            raise InvalidJob(
                "job_unknown",
                f"No job {job_id} in the log of {self.settings.data_dir}, nor in its lake.",
            )
        return seen

    def cancel(self, job_id: str) -> None:
        """Ask to cancel. A job that has not ended when the dispatcher hears of it ends as cancelled."""
        _check_id(job_id)
        self.log.append([NewRecord(CONTROL, job_id, cancel_headers(self.tenant, job_id), b"")])

    def models(self) -> list[ModelCard]:
        """What is installed."""
        return self._catalogue.cards()

    @property
    def dead_letters(self) -> DeadLetters:
        """To look at jobs that failed, of any tenant, and to submit them again."""
        return DeadLetters(self.log, self._keys, self.settings.dispatcher.max_deadline_s)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        if "_ears" in self.__dict__:
            self._ears.close()
        if "log" in self.__dict__:
            self.log.close()
        for name in ("_redis", "_view_redis"):
            if name in self.__dict__:
                self.__dict__[name].close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _keys(self) -> TenantKeys:
        return self.settings.tenants.secrets()

    @cached_property
    def _redis(self) -> Redis:
        return connect_redis(self.settings)

    @cached_property
    def _view_redis(self) -> Redis:
        return connect_view(self.settings)

    @cached_property
    def _view(self) -> JobView:
        return JobView(self._view_redis)

    @cached_property
    def log(self) -> EventLog:
        return connect_log(self.settings, self._ring)

    @cached_property
    def _objects(self) -> ObjectStore:
        return connect_objects(self.settings)

    @cached_property
    def _catalogue(self) -> Catalogue:
        return Catalogue(self._objects)

    @cached_property
    def fleet(self) -> Fleet:
        return Fleet(self._redis)

    def _ring(self) -> None:
        """Wake the dispatcher. It looks by itself soon enough if this fails."""
        with suppress(Transient):
            self.fleet.ring()

    @cached_property
    def _ears(self) -> Ears:
        return Ears(lambda: self._view.notices(self.id))

    def _find_in_lake(self, job_id: str) -> Outcome | None:
        return find_in_lake(self._objects, job_id, self.settings.dispatcher.max_deadline_s / DAY_S)

    # ── parts of submit ──────────────────────────────────────────────────────────────────────────

    def _job(self, model: str, payload: Submittable, key: str | None, options: JobOptions) -> Job:
        _check_options(options, key)
        version, tier = options.get("version"), options.get("tier")
        deadline_s = options.get("deadline_s")
        card = self._catalogue.resolve(model, version)
        job_id = new_job_id(self.tenant, key)
        now = time.time()
        deadline_at = now + (DEFAULT_DEADLINE_S if deadline_s is None else deadline_s)
        params = plain_params(options.get("params") or {})
        check_deadline(deadline_at, self.settings.dispatcher.max_deadline_s, now)
        job = Job(
            id=job_id,
            topic=jobs_topic(card.modality, tier or card.tier),  # type: ignore[arg-type]
            tenant=self.tenant,
            model=model,
            version=version,
            payload=make_payload(
                payload,
                card,
                self._objects,
                tenant=self.tenant,
                job_id=job_id,
                content_type=options.get("content_type"),
            ),
            submitted_at=now,
            deadline_at=deadline_at,
            priority=options.get("priority", 0),
            key=key,
            params=params,
            reply_to=self.id,
            traceparent=new_traceparent(),
        )
        check_limits(job, card)
        return signed(job, self._keys)

    def _append(self, jobs: Sequence[Job]) -> None:
        self.log.append([NewRecord(j.topic, j.id, job_headers(j), job_value(j)) for j in jobs])

    def _accept(self, group: list[Job]) -> Iterator[JobHandle]:
        if group:
            self._append(group)
            yield from map(self._handle, group)

    def _handle(self, job: Job) -> JobHandle:
        return JobHandle(job.id, self, job.fingerprint if job.key is not None else None)

    def _as_handle(self, job: JobHandle | str) -> JobHandle:
        return JobHandle(_check_id(job), self) if isinstance(job, str) else job


def _checked(outcome: Outcome, handle: JobHandle) -> Outcome:
    """The outcome; a conflict if it is that of other work under the same idempotency key."""
    if handle.fingerprint is None or handle.fingerprint == outcome.fingerprint:
        return outcome
    return msgspec.structs.replace(
        outcome,
        status="failed",
        code=CONFLICT,
        message=f"The idempotency key of job {outcome.job_id} already stands for another payload, "
        "model or params; use a new key for new work.",
        answer=NO_ANSWER,
        ref=None,
    )


def _check_id(job_id: str) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise InvalidJob("job_id_invalid", f"Expected a job id, came {job_id[:80]!r}.")
    return job_id


def _check_options(options: JobOptions, key: str | None) -> None:
    tier, priority = options.get("tier"), options.get("priority", 0)
    deadline_s = options.get("deadline_s")
    if tier is not None and tier not in LANES:
        raise InvalidJob("tier_unknown", f"Expected a tier of {', '.join(LANES)}, came {tier!r}.")
    if type(priority) is not int or priority not in PRIORITIES:
        raise InvalidJob("priority_invalid", f"Expected a priority of 0 to 9, came {priority!r}.")
    if deadline_s is not None and not deadline_s > 0:
        raise InvalidJob(
            "deadline_past", f"Expected a deadline in the future, came {deadline_s} s from now."
        )
    if key is not None and not (0 < len(key) <= KEY_LIMIT_CHARS and _is_unicode(key)):
        raise InvalidJob(
            "key_invalid",
            f"Expected an idempotency key of 1 to {KEY_LIMIT_CHARS} Unicode characters, "
            f"came {key[:40]!a} of {len(key)}.",
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
