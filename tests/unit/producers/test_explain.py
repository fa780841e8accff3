"""Why a job waits, in sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from infra.fleet import DispatcherBeat, LaneSnapshot, WorkerBeat
from producers.explain import explain_job
from schemas.errors import InvalidJob, Transient
from schemas.results import Outcome


class FakeFleet:
    def __init__(self) -> None:
        self.beat: DispatcherBeat | None = None
        self.worker_beats: list[WorkerBeat] = []
        self.away = False

    def ring(self) -> None:
        pass

    def dispatchers(self) -> list[DispatcherBeat]:
        if self.away:
            raise Transient("redis_unavailable", "Redis did not answer.")
        return [self.beat] if self.beat else []

    def workers(self) -> list[WorkerBeat]:
        return self.worker_beats


@pytest.fixture
def fleet(client: Any) -> FakeFleet:
    fleet = FakeFleet()
    client.__dict__["fleet"] = fleet
    return fleet


@pytest.fixture
def explained(client: Any, fleet: FakeFleet) -> Callable[[], str]:
    job_id = client.submit("echo", "x").id
    return lambda: "\n".join(explain_job(client, job_id))


def beat(**facts: Any) -> DispatcherBeat:
    quiet: dict[str, Any] = {
        "slot": 0, "pid": 1, "started_at": 0.0, "at": 0.0, "waiting": {}, "models": {},
        "delayed": 0, "running": 0, "running_jobs": 0, "ended": {}, "redispatched": 0,
        "trouble": None,
    }  # fmt: skip
    return DispatcherBeat(**(quiet | facts))


def worker(**facts: Any) -> WorkerBeat:
    ready: dict[str, Any] = {
        "worker": "w", "life": "l", "pid": 1, "started_at": 0.0, "ready": True, "draining": False,
        "slots": 3, "batches": [], "engines": [], "memory_bytes": 0, "jobs_done": 0,
    }  # fmt: skip
    return WorkerBeat(**(ready | facts))


def test_without_a_dispatcher_that_is_said(explained: Callable[[], str]) -> None:
    assert "No dispatcher" in explained()


def test_a_dispatcher_in_trouble_is_named(explained: Callable[[], str], fleet: FakeFleet) -> None:
    fleet.beat = beat(trouble="log_full")

    assert "log_full" in explained()


@pytest.mark.parametrize("state", [{"ready": False}, {"draining": True}])
def test_without_a_ready_worker_that_is_said(
    explained: Callable[[], str], fleet: FakeFleet, state: dict[str, bool]
) -> None:
    fleet.beat = beat()
    fleet.worker_beats = [worker(**state)]

    assert "No worker is ready (1 starting or draining)" in explained()


def test_what_is_ahead_is_told(explained: Callable[[], str], fleet: FakeFleet) -> None:
    fleet.beat = beat(
        waiting={"standard": LaneSnapshot(7, 2.0)}, running=2, running_jobs=40, delayed=3
    )
    fleet.worker_beats = [worker(batches=["a", "b"])]

    told = explained()

    assert "Lane standard: 7 admitted jobs" in told
    assert "40 jobs are running in 2 batches" in told
    assert "3 jobs wait for the time of their next attempt" in told
    assert "1 workers are ready; they hold 2 batches in 3 slots" in told
    assert "jobs.text.standard (lane standard): 1 jobs not ended" in told


def test_a_stack_that_is_down_is_no_error(explained: Callable[[], str], fleet: FakeFleet) -> None:
    fleet.away = True

    told = explained()

    assert "The stack is not running" in told
    assert "jobs.text.standard" in told


def test_a_job_that_ended_does_not_wait(
    client: Any, fleet: FakeFleet, view: Any, succeeded: Callable[..., Outcome]
) -> None:
    view.end(
        succeeded("a", status="failed", code="bad", message="It was bad.", submitted_at=10.0,
                  finished_at=12.5)
    )  # fmt: skip

    (told,) = explain_job(client, "a")

    assert "ended as failed after 2.50 s: bad: It was bad." in told


def test_an_unknown_job_is_refused(client: Any, fleet: FakeFleet) -> None:
    with pytest.raises(InvalidJob) as caught:
        explain_job(client, "nobody")

    assert caught.value.code == "job_unknown"
