"""Why a job waits, and behind what: from its record, the lag of its lane, and what the fleet shows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from schemas.errors import Transient
from schemas.topics import JOB_TOPICS, lane_of

if TYPE_CHECKING:
    from infra.fleet import DispatcherBeat, WorkerBeat
    from producers.client import Client
    from schemas.results import Outcome


def explain_job(client: Client, job_id: str) -> list[str]:
    """Sentences, the most telling first. Raises InvalidJob (job_unknown) and Transient (log)."""
    outcome = client.status(job_id)
    if outcome.ended:
        return [_ended(outcome)]
    reasons = []
    try:
        reasons += _fleet(client, outcome)
    except Transient as error:
        reasons.append(f"The stack is not running: {error.message} The job runs once it is up.")
    return [_state(outcome), *reasons, *_queue(client, outcome)]


def _ended(outcome: Outcome) -> str:
    took_s = (outcome.finished_at or 0) - outcome.submitted_at
    reason = f": {outcome.code}: {outcome.message}" if outcome.code else ""
    return f"It does not wait: it ended as {outcome.status} after {took_s:.2f} s{reason}."


def _state(outcome: Outcome) -> str:
    age_s = time.time() - outcome.submitted_at
    if outcome.status == "running":
        return f"It is with a worker; it was submitted {age_s:.1f} s ago."
    return f"It is accepted and waits since {age_s:.1f} s."


def _fleet(client: Client, outcome: Outcome) -> list[str]:
    dispatcher = client.fleet.dispatcher()
    workers = client.fleet.workers()
    reasons = [_dispatcher(dispatcher)] if dispatcher is None or dispatcher.trouble else []
    reasons.append(_workers(workers))
    if dispatcher:
        reasons += _ahead(dispatcher, outcome)
    return reasons


def _dispatcher(dispatcher: DispatcherBeat | None) -> str:
    if dispatcher is None:
        return "No dispatcher shows a sign of life; `headrace status` says more."
    return f"The dispatcher is in trouble ({dispatcher.trouble}) and tries again by itself."


def _workers(workers: list[WorkerBeat]) -> str:
    ready = [worker for worker in workers if worker.ready and not worker.draining]
    if not ready:
        return f"No worker is ready ({len(workers)} starting or draining)."
    busy = sum(len(worker.batches) for worker in ready)
    slots = sum(worker.slots for worker in ready)
    return f"{len(ready)} workers are ready; they hold {busy} batches in {slots} slots."


def _ahead(dispatcher: DispatcherBeat, outcome: Outcome) -> list[str]:
    reasons = [
        f"Lane {lane}: {shown.waiting} admitted jobs wait for a slot, the oldest since {shown.oldest_s:.1f} s."
        for lane, shown in sorted(dispatcher.waiting.items())
    ]
    if dispatcher.running:
        reasons.append(
            f"{dispatcher.running_jobs} jobs are running in {dispatcher.running} batches."
        )
    if dispatcher.delayed:
        reasons.append(f"{dispatcher.delayed} jobs wait for the time of their next attempt.")
    if outcome.version:
        waiting = dispatcher.models.get(f"{outcome.model}/{outcome.version}", 0)
        reasons.append(f"{waiting} of the waiting jobs are for {outcome.model}/{outcome.version}.")
    return reasons


def _queue(client: Client, outcome: Outcome) -> list[str]:
    lag = client.log.lag("dispatcher", JOB_TOPICS)
    return [
        f"{topic} (lane {lane_of(topic)}): {behind.open} jobs not ended, the oldest is {behind.oldest_age_s:.1f} s old."
        for topic, behind in sorted(lag.items())
        if behind.open
    ]
