"""Real processes of a few milliseconds, on a clock that only the test moves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.embedded.child import FAILING_DEATHS, Child, ChildSpec
from infra.embedded.supervisor import Event, Supervisor

STAYS = ("sleep", "60")
DIES = ("sh", "-c", "echo no luck; exit 3")


class Stage:
    """A supervisor with what it reported and its clock."""

    def __init__(self, folder: Path, specs: list[ChildSpec]) -> None:
        self.now = 100.0
        self.events: list[Event] = []
        self.supervisor = Supervisor(specs, folder, self.events.append, lambda: self.now)

    def tick(self) -> list[tuple[str, str]]:
        """Tick once; returns kind and child of what was reported meanwhile."""
        self.events.clear()
        self.supervisor.tick()
        return [(event.kind, event.child) for event in self.events]

    def wait_for_end(self, child: int = 0) -> None:
        process = self.supervisor.children[child].process
        assert process is not None
        process.wait()

    def states(self) -> dict[str, str]:
        return {child.name: child.state for child in self.supervisor.describe()}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    stages = []

    def make(*specs: ChildSpec) -> Stage:
        stages.append(Stage(tmp_path, list(specs)))
        return stages[-1]

    yield make
    for stage in stages:
        for child in stage.supervisor.children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()


def always(_pid: int) -> bool:
    return True


def never(_pid: int) -> bool:
    return False


def test_stage_0_is_ready_before_the_others_start(start: Callable[..., Stage]) -> None:
    up: list[int] = []
    redis = ChildSpec("redis", STAYS, lambda pid: pid in up, stage=0)
    stage = start(redis, ChildSpec("worker", STAYS, always, stage=2))

    assert stage.tick() == [("started", "redis")]
    assert stage.tick() == []
    assert stage.states() == {"redis": "starting", "worker": "waiting"}

    up.append(stage.supervisor.describe()[0].pid)
    assert stage.tick() == [("ready", "redis"), ("started", "worker")]


def test_a_dead_child_is_said_and_restarted_when_its_delay_is_over(
    start: Callable[..., Stage],
) -> None:
    stage = start(ChildSpec("worker", DIES, never))
    stage.tick()
    stage.wait_for_end()

    assert stage.tick() == [("died", "worker")]
    assert stage.events[0].text == "died: exit code 3; restart 1"
    assert stage.events[0].seconds == pytest.approx(0.2)
    stage.now += 0.19
    assert stage.tick() == []
    stage.now += 0.02
    assert stage.tick() == [("started", "worker")]


def test_the_owner_may_sleep_until_the_restart_is_due(start: Callable[..., Stage]) -> None:
    stage = start(ChildSpec("worker", DIES, never))
    stage.tick()
    stage.wait_for_end()
    stage.tick()

    assert stage.supervisor.pause_s() == pytest.approx(0.2)


def test_a_child_that_never_gets_ready_is_failing_and_still_tried(
    start: Callable[..., Stage], tmp_path: Path
) -> None:
    stage = start(ChildSpec("worker", DIES, never))
    kinds: list[str] = []
    for _ in range(FAILING_DEATHS + 1):
        kinds += [kind for kind, _ in stage.tick()]
        stage.wait_for_end()
        kinds += [kind for kind, _ in stage.tick()]
        stage.now += 10

    assert kinds.count("failing") == 1
    assert kinds.count("died") == FAILING_DEATHS + 1
    assert stage.states() == {"worker": "failing"}
    assert (tmp_path / "worker.log").read_text() == "no luck\n" * (FAILING_DEATHS + 1)


def test_a_program_that_is_not_there_is_a_death_like_any_other(
    start: Callable[..., Stage],
) -> None:
    stage = start(ChildSpec("redis", ("/nonexistent/redis-server",), never, stage=0))

    assert stage.tick() == [("died", "redis")]
    assert "could not be started" in stage.supervisor.describe()[0].last_exit


def test_how_long_it_took_to_be_ready_is_kept(start: Callable[..., Stage]) -> None:
    stage = start(ChildSpec("worker", STAYS, always))
    stage.tick()
    stage.now += 1.5
    stage.tick()

    assert stage.supervisor.describe()[0].ready_s == pytest.approx(1.5)


def test_stopping_goes_from_the_last_stage_down(start: Callable[..., Stage]) -> None:
    stage = start(
        ChildSpec("redis", STAYS, always, stage=0),
        ChildSpec("dispatcher", STAYS, always, stage=1),
        ChildSpec("worker", STAYS, always, stage=2),
    )
    while set(stage.states().values()) != {"ready"}:
        stage.tick()
    stage.events.clear()

    stage.supervisor.stop(5, lambda _s: reap(stage), lambda: False)

    assert [event.child for event in stage.events] == ["worker", "dispatcher", "redis"]
    assert {event.text for event in stage.events} == {"stopped: killed by SIGTERM"}


def test_while_workers_stop_a_dead_dispatcher_is_started_again(
    start: Callable[..., Stage],
) -> None:
    stage = start(
        ChildSpec("dispatcher", STAYS, always, stage=1),
        ChildSpec("worker", STAYS, always, stage=2),
    )
    while set(stage.states().values()) != {"ready"}:
        stage.tick()
    dispatcher, worker = stage.supervisor.children
    dispatcher.send(signal.SIGKILL)
    freeze(worker)
    stage.wait_for_end(0)
    stage.events.clear()

    def wait(_timeout_s: float) -> None:
        stage.now += 0.3
        if dispatcher.restarts.count and dispatcher.state == "ready":
            worker.send(signal.SIGCONT)
            reap(stage)

    stage.supervisor.stop(60, wait, lambda: False)

    kinds = [(event.kind, event.child) for event in stage.events]
    assert kinds.index(("started", "dispatcher")) < kinds.index(("stopped", "worker"))


def test_who_does_not_stop_in_time_is_killed_and_that_is_said(
    start: Callable[..., Stage],
) -> None:
    stage = start(ChildSpec("worker", STAYS, always))
    stage.tick()
    stage.tick()
    freeze(stage.supervisor.children[0])
    stage.events.clear()

    def wait(_timeout_s: float) -> None:
        stage.now += 1
        if any(event.kind == "killed" for event in stage.events):
            reap(stage)

    stage.supervisor.stop(3, wait, lambda: False)

    assert [event.kind for event in stage.events] == ["killed", "stopped"]
    assert stage.events[-1].text == "stopped: killed by SIGKILL"


def test_in_a_hurry_nobody_is_waited_for(start: Callable[..., Stage]) -> None:
    stage = start(ChildSpec("worker", STAYS, always))
    stage.tick()
    stage.tick()
    freeze(stage.supervisor.children[0])
    stage.events.clear()

    stage.supervisor.stop(3600, lambda _s: reap(stage), lambda: True)

    assert [event.kind for event in stage.events] == ["killed", "stopped"]


def freeze(child: Child) -> None:
    """Stop it for good: a SIGTERM that comes before it has stopped would still end it."""
    assert child.process is not None
    child.send(signal.SIGSTOP)
    os.waitpid(child.process.pid, os.WUNTRACED)


def reap(stage: Stage) -> None:
    """Wait for everybody who was told to end."""
    for child in stage.supervisor.children:
        if child.process is not None and not child.wanted:
            child.process.wait()
