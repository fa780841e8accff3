"""Why a job waits, in sentences."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from infra.eventlog import NewRecord
from infra.fleet import DispatcherBeat, LaneSnapshot, WorkerBeat
from producers.explain import WAITS_FOR, explain_job
from schemas.errors import InvalidJob, Transient
from schemas.jobs import job_value, read_job, retry_headers
from schemas.results import Outcome
from schemas.topics import RETRY
from workers.dispatcher.settle import BLAMELESS


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


@pytest.fixture
def put_off(client: Any) -> Callable[..., str]:
    """`put_off(waits_for=...)`: what is told of a job that the dispatcher has put off."""

    def tell(in_s: float = 30.0, **facts: Any) -> str:
        job_id = client.submit("echo", "x").id
        *_, record = client.log.read(["jobs.text.standard"], 0.0)
        job = read_job(record.position.topic, record.headers, record.value, 0.0)
        for due, own in ((1.0, {}), (time.time() + in_s, facts)):
            again = msgspec.structs.replace(job, version=1, not_before=due, **own)
            client.log.append([NewRecord(RETRY, job_id, retry_headers(again), job_value(again))])
        return "\n".join(explain_job(client, job_id))

    return tell


@pytest.mark.parametrize("code", ["engine_not_built", "engine_build_busy"])
def test_an_engine_that_is_not_built_yet_is_named_with_what_to_look_at(
    put_off: Callable[..., str], fleet: FakeFleet, code: str
) -> None:
    told = put_off(waits_for=code)

    assert f"the engine of echo/1 to be built for the workers' platform ({code})" in told
    assert re.search(r"it is tried next at \d\d:\d\d:\d\d", told)
    assert "See that a builder runs" in told


def test_what_a_job_may_wait_for_has_its_words() -> None:
    assert WAITS_FOR.keys() == BLAMELESS


@pytest.mark.parametrize("code", [*sorted(BLAMELESS), "of_a_later_version"])
def test_whatever_a_job_waits_for_is_told(
    put_off: Callable[..., str], fleet: FakeFleet, code: str
) -> None:
    assert f"({code}); it is tried next at" in put_off(waits_for=code)


def test_a_job_whose_attempts_failed_is_told_so(
    put_off: Callable[..., str], fleet: FakeFleet
) -> None:
    assert "2 of its attempts failed; it is tried next at" in put_off(attempt=2)


def test_what_a_job_waited_for_is_told_as_long_as_it_says_something(
    put_off: Callable[..., str], fleet: FakeFleet
) -> None:
    assert "it is due again since" in put_off(in_s=-1.0, waits_for="engine_not_built")


def test_what_a_job_waited_for_long_ago_is_not_told(
    put_off: Callable[..., str], fleet: FakeFleet
) -> None:
    assert "engine" not in put_off(in_s=-100.0, waits_for="engine_not_built")


def test_a_job_that_was_put_off_is_not_with_the_worker_any_more(
    put_off: Callable[..., str], fleet: FakeFleet, view: Any, succeeded: Any, monkeypatch: Any
) -> None:
    """The view shows what runs for long, and not that it was put off then."""
    monkeypatch.setattr(
        view, "get", lambda ids: [succeeded(ids[0], status="running", submitted_at=1.0)]
    )

    assert "It is accepted and waits" in put_off(waits_for="storage_full")
    assert "It is with a worker" in put_off(in_s=-100.0)


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
