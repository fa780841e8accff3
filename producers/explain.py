"""Why a job waits, and behind what: from its record, the lag of its lane, and what the fleet shows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from producers.job_search import find_retry
from schemas.errors import Transient
from schemas.topics import JOB_TOPICS, lane_of

if TYPE_CHECKING:
    from infra.fleet import DispatcherBeat, WorkerBeat
    from producers.client import Client
    from schemas.jobs import Job
    from schemas.results import Outcome

STALE_S = 60.0
"""What a job waited for says little about one that is due again for longer."""

ENGINE = (
    "for the engine of {model} to be built for the workers' platform",
    "See that a builder runs for that platform, and that no build failed: `headrace engines list`.",
)
CACHE = (
    "for a worker that can use its engine cache",
    "See how full the workers' disks are, and what their logs say.",
)
STORE = (
    "for the object store, which is full or away",
    "See `headrace doctor`.",
)
WAITS_FOR = {
    "engine_not_built": ENGINE,
    "engine_build_busy": ENGINE,
    "engine_cache_unavailable": CACHE,
    "engine_memory_full": (
        "for room in a worker's engine memory: the models there are premium, or came a moment ago",
        "Where it stays so, raise HEADRACE_WORKER__MEMORY_BYTES or add a worker.",
    ),
    "disk_full": CACHE,
    "storage_full": STORE,
    "storage_unavailable": STORE,
}
"""What a job waits for, by the code that a worker had, and what to look at."""


def explain_job(client: Client, job_id: str) -> list[str]:
    """Sentences, the most telling first. Raises InvalidJob (job_unknown) and Transient (log)."""
    outcome = client.status(job_id)
    if outcome.ended:
        return [_ended(outcome)]
    put_off = find_retry(client.log, job_id)
    reasons = _why_put_off(put_off, time.time()) if put_off else []
    try:
        reasons += _fleet(client, outcome)
    except Transient as error:
        reasons.append(f"The stack is not running: {error.message} The job runs once it is up.")
    return [_state(outcome, put_off), *reasons, *_queue(client, outcome)]


def _ended(outcome: Outcome) -> str:
    took_s = (outcome.finished_at or 0) - outcome.submitted_at
    reason = f": {outcome.code}: {outcome.message}" if outcome.code else ""
    return f"It does not wait: it ended as {outcome.status} after {took_s:.2f} s{reason}."


def _state(outcome: Outcome, put_off: Job | None) -> str:
    now = time.time()
    age_s = now - outcome.submitted_at
    if outcome.status == "running" and not (put_off and put_off.not_before > now):
        return f"It is with a worker; it was submitted {age_s:.1f} s ago."
    return f"It is accepted and waits since {age_s:.1f} s."


def _why_put_off(job: Job, now: float) -> list[str]:
    if now - job.not_before > STALE_S:
        return []
    due = "is tried next at" if job.not_before > now else "is due again since"
    due = f"it {due} {clock(job.not_before)}."
    if job.waits_for is None:
        return [f"{job.attempt} of its attempts failed; {due}"] if job.attempt else []
    what, look = WAITS_FOR.get(job.waits_for, ("for no fault of its own", "See the workers' logs."))
    model = f"{job.model}/{job.version}"
    return [f"It waits {what.format(model=model)} ({job.waits_for}); {due}", look]


def _fleet(client: Client, outcome: Outcome) -> list[str]:
    dispatchers = client.fleet.dispatchers()
    return [
        *_trouble(dispatchers),
        _workers(client.fleet.workers()),
        *_ahead(dispatchers, outcome),
    ]


def _trouble(dispatchers: list[DispatcherBeat]) -> list[str]:
    if not dispatchers:
        return ["No dispatcher shows a sign of life; `headrace status` says more."]
    return [
        f"Dispatcher {beat.slot} is in trouble ({beat.trouble}) and tries again by itself."
        for beat in dispatchers
        if beat.trouble
    ]


def _workers(workers: list[WorkerBeat]) -> str:
    ready = [worker for worker in workers if worker.ready and not worker.draining]
    if not ready:
        return f"No worker is ready ({len(workers)} starting or draining)."
    busy = sum(len(worker.batches) for worker in ready)
    slots = sum(worker.slots for worker in ready)
    return f"{len(ready)} workers are ready; they hold {busy} batches in {slots} slots."


def _ahead(dispatchers: list[DispatcherBeat], outcome: Outcome) -> list[str]:
    reasons = []
    for lane in sorted({lane for beat in dispatchers for lane in beat.waiting}):
        shown = [beat.waiting[lane] for beat in dispatchers if lane in beat.waiting]
        waiting, oldest_s = sum(s.waiting for s in shown), max(s.oldest_s for s in shown)
        reasons.append(
            f"Lane {lane}: {waiting} admitted jobs wait for a slot, the oldest since {oldest_s:.1f} s."
        )
    if batches := sum(beat.running for beat in dispatchers):
        jobs = sum(beat.running_jobs for beat in dispatchers)
        reasons.append(f"{jobs} jobs are running in {batches} batches.")
    if delayed := sum(beat.delayed for beat in dispatchers):
        reasons.append(f"{delayed} jobs wait for the time of their next attempt.")
    for beat in dispatchers:
        reasons += [
            f"{model} only makes dead letters; its jobs are held back, and one is tried at {clock(at)}."
            for model, at in beat.held_back.items()
            if model.startswith(f"{outcome.model}/") and model.endswith(f" of {outcome.tenant}")
        ]
    if outcome.version and dispatchers:
        model = f"{outcome.model}/{outcome.version}"
        waiting = sum(beat.models.get(model, 0) for beat in dispatchers)
        reasons.append(f"{waiting} of the waiting jobs are for {outcome.model}/{outcome.version}.")
    return reasons


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _queue(client: Client, outcome: Outcome) -> list[str]:
    lag = client.log.lag("dispatcher", JOB_TOPICS)
    return [
        f"{topic} (lane {lane_of(topic)}): {behind.open} jobs not ended, the oldest is {behind.oldest_age_s:.1f} s old."
        for topic, behind in sorted(lag.items())
        if behind.open
    ]
