"""Keeps the embedded stack's processes running: start, watch, restart, stop. Knows nothing of jobs.

One thread, no waiting: the owner calls `tick` and sleeps for `pause_s` or until a child ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from msgspec import Struct

BACKOFF_BASE_S = 0.2
BACKOFF_CAP_S = 10.0
HEALTHY_S = 30.0
FAILING_DEATHS = 5
LOG_LIMIT_BYTES = 10 * 1024 * 1024
STARTING_POLL_S = 0.02
IDLE_POLL_S = 1.0

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

State = Literal["waiting", "starting", "ready", "restarting", "failing", "stopped"]


@dataclass(frozen=True)
class ChildSpec:
    """A process to keep running.

    ready: told the pid, says whether that process is ready; polled until it is, must not block.
    stage: stage 0 is ready before the others start; stopping goes from the highest stage down.
    environment: additions to our own.
    """

    name: str
    command: tuple[str, ...]
    ready: Callable[[int], bool]
    stage: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


class ChildState(Struct, frozen=True):
    """What is told about a child. start: with pid, its identity (`start_of`); 0 if not running.

    ready_s: from its start until it was ready. last_exit: how it ended the last time, "" if never.
    """

    name: str
    state: State
    pid: int
    start: float
    ready_s: float | None
    restarts: int
    last_exit: str


class Event(NamedTuple):
    """Something to tell people. seconds: what it took, or what is waited for."""

    kind: Literal["started", "ready", "died", "failing", "killed", "stopped"]
    child: str
    text: str
    seconds: float = 0.0


@dataclass
class Restarts:
    """When a dead child may start again. Pure: durations in, durations out."""

    count: int = 0
    unready_deaths: int = 0
    """Deaths in a row before it was ready."""
    delay_s: float = 0.0

    def died(self, ready_for_s: float | None) -> float:
        """Note a death; returns the delay before the next start. ready_for_s: None if never ready.

        The delay doubles while the child keeps dying and starts over once it was healthy for
        ten times that delay, or 30 s: waiting costs it a tenth of its time at most.
        """
        self.count += 1
        self.unready_deaths = self.unready_deaths + 1 if ready_for_s is None else 0
        healthy_s = min(HEALTHY_S, 10 * self.delay_s)
        if self.delay_s == 0 or (ready_for_s is not None and ready_for_s >= healthy_s):
            self.delay_s = BACKOFF_BASE_S
        else:
            self.delay_s = min(BACKOFF_CAP_S, 2 * self.delay_s)
        return self.delay_s

    @property
    def failing(self) -> bool:
        return self.unready_deaths >= FAILING_DEATHS


class Child:
    """One spec and, while it runs, its process."""

    def __init__(self, spec: ChildSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.restarts = Restarts()
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = True
        self.start_at = 0.0
        self.started = 0.0
        self.start = 0.0
        self.ready_s: float | None = None
        self.last_exit = ""

    def spawn(self, now: float) -> None:
        rotate(self.log)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.spec.environment},
                # Its own session: the terminal's Ctrl-C is for us, and we stop it in its turn.
                start_new_session=True,
                preexec_fn=_end_with_parent(os.getpid()),
            )
        self.started, self.ready_s = now, None
        self.start = start_of(self.process.pid) or 0.0

    def send(self, signum: signal.Signals) -> None:
        """Signal it, if it runs; SIGKILL takes along whatever it started."""
        if self.process is None or self.process.poll() is not None:
            return
        if signum == signal.SIGKILL:
            os.killpg(self.process.pid, signum)
        else:
            self.process.send_signal(signum)

    def ended(self, how: str, now: float) -> None:
        ready_for_s = None if self.ready_s is None else now - self.started - self.ready_s
        self.process, self.start, self.ready_s = None, 0.0, None
        self.last_exit = how
        if self.wanted:
            self.start_at = now + self.restarts.died(ready_for_s)

    @property
    def state(self) -> State:
        if self.process is None:
            idle: State = "restarting" if self.restarts.count else "waiting"
            return ("failing" if self.restarts.failing else idle) if self.wanted else "stopped"
        if self.ready_s is not None:
            return "ready"
        return "failing" if self.restarts.failing else "starting"

    def describe(self) -> ChildState:
        return ChildState(
            name=self.spec.name,
            state=self.state,
            pid=self.process.pid if self.process else 0,
            start=self.start,
            ready_s=self.ready_s,
            restarts=self.restarts.count,
            last_exit=self.last_exit,
        )


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

    @property
    def ready(self) -> bool:
        return all(child.ready_s is not None for child in self.children)

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
                child.ready_s = now - child.started
                child.restarts.unready_deaths = 0
                self._report(Event("ready", child.spec.name, "ready", child.ready_s))
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


def describe_exit(exit_status: int) -> str:
    """exit_status: as Popen.returncode has it, negative for a signal."""
    if exit_status >= 0:
        return f"exit code {exit_status}"
    try:
        return f"killed by {signal.Signals(-exit_status).name}"
    except ValueError:
        return f"killed by signal {-exit_status}"


def start_of(pid: int) -> float | None:
    """When the process started: with its pid an identity that is never reused. None if it is dead.

    On Linux in clock ticks since boot, because the wall clock may be set while it runs.
    """
    if sys.platform != "linux":
        try:
            process = psutil.Process(pid)
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return None if zombie else float(process.create_time())
        except psutil.Error:
            return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else float(fields[18])


def rotate(log: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Move a large log's content to `<log>.1`. What is written in that instant may be lost.

    Copied and truncated, because the process that writes it (by O_APPEND) keeps it open.
    """
    try:
        if log.stat().st_size > limit_bytes:
            shutil.copyfile(log, f"{log}.1")
            os.truncate(log, 0)
    except OSError:
        # Not there yet, or a full disk: a log is never a reason to stop.
        return


def _end_with_parent(parent: int) -> Callable[[], None] | None:
    """On Linux the kernel sends a child SIGTERM when we are killed. Runs between fork and exec."""
    if _LIBC is None:
        return None

    def arrange() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return arrange
