"""Keeps the embedded stack's processes running: start, watch, restart, stop. Knows nothing of jobs.

One thread, no waiting: the owner calls `tick` and sleeps for `pause_s` or until a child ends.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from infra.embedded.child import FAILING_DEATHS, Child, ChildSpec, rotate
from infra.embedded.processes import describe_exit
from infra.embedded.record import ChildState

STARTING_POLL_S = 0.02
IDLE_POLL_S = 1.0


class Event(NamedTuple):
    """Something to tell people. seconds: what it took, or what is waited for."""

    kind: Literal["started", "ready", "died", "failing", "stopping", "killed", "stopped"]
    child: str
    text: str
    seconds: float = 0.0


class Supervisor:
    """Owns the children from their first start to their end. report: called with each event."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        log_dir: Path,
        report: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.children = [Child(spec, log_dir / f"{spec.name}.log") for spec in specs]
        self._report = report
        self._clock = clock

    def describe(self) -> list[ChildState]:
        return [child.describe() for child in self.children]

    def tick(self) -> None:
        """Reap who ended, start who is due, note who got ready, keep the logs small."""
        now = self._clock()
        for child in self.children:
            if child.process is None:
                if child.wanted and now >= child.start_at and self._may_start(child):
                    self._start(child, now)
                continue
            exit_status = child.process.poll()
            if exit_status is not None:
                self._ended(child, describe_exit(exit_status), now)
            elif child.ready_s is None and child.spec.ready(child.process.pid):
                self._report(Event("ready", child.spec.name, "ready", child.got_ready(now)))
            rotate(child.log)

    def pause_s(self) -> float:
        """How long the owner may sleep before the next tick, unless a child ends."""
        now = self._clock()
        waits = [IDLE_POLL_S]
        for child in self.children:
            if child.process is None and child.wanted:
                waits.append(max(STARTING_POLL_S, child.start_at - now))
            elif child.process is not None and child.ready_s is None:
                waits.append(STARTING_POLL_S)
        return min(waits)

    def stop(
        self, stop_s: float, wait: Callable[[float], None], hurried: Callable[[], bool]
    ) -> None:
        """End all children, stage by stage; lower stages are kept running meanwhile.

        stop_s: patience with each stage before SIGKILL. wait: sleeps, or returns early when a
        child ends. hurried: True from the moment somebody wants it over with.
        """
        for stage in sorted({child.spec.stage for child in self.children}, reverse=True):
            members = [child for child in self.children if child.spec.stage == stage]
            for child in members:
                child.wanted = False
                child.send(signal.SIGTERM)
            if not self._ended_within(stop_s, members, wait, hurried):
                self._kill(members)
                self._ended_within(stop_s, members, wait, lambda: False)

    def _ended_within(
        self,
        patience_s: float,
        members: Sequence[Child],
        wait: Callable[[float], None],
        hurried: Callable[[], bool],
    ) -> bool:
        deadline = self._clock() + patience_s
        while any(child.process for child in members):
            if hurried() or self._clock() >= deadline:
                return False
            wait(STARTING_POLL_S)
            self.tick()
        return True

    def _kill(self, members: Sequence[Child]) -> None:
        for child in members:
            if child.process is not None:
                child.send(signal.SIGKILL)
                text = "killed: it did not stop in time"
                self._report(Event("killed", child.spec.name, text))

    def _may_start(self, child: Child) -> bool:
        """Later stages wait for stage 0 at first; afterwards they bear its restarts."""
        return (
            child.spec.stage == 0
            or child.restarts.count > 0
            or all(other.ready_s is not None for other in self.children if other.spec.stage == 0)
        )

    def _start(self, child: Child, now: float) -> None:
        try:
            child.spawn(now)
        except OSError as error:
            # Out of processes, memory or disk: as passing as any other death.
            self._ended(child, f"could not be started: {error}", now)
        else:
            self._report(Event("started", child.spec.name, "started"))

    def _ended(self, child: Child, how: str, now: float) -> None:
        child.ended(how, now)
        name = child.spec.name
        if not child.wanted:
            self._report(Event("stopped", name, f"stopped: {how}"))
            return
        text = f"died: {how}; restart {child.restarts.count}"
        self._report(Event("died", name, text, child.start_at - now))
        if child.restarts.unready_deaths == FAILING_DEATHS:
            text = f"failing: died {FAILING_DEATHS} times before it was ready; see {child.log}"
            self._report(Event("failing", name, text))
