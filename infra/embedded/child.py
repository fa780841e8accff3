"""One process of the embedded stack: what it is, when it may start again, its output."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.embedded.processes import end_with_parent, send_signal, start_of
from infra.embedded.record import ChildState, State

BACKOFF_BASE_S = 0.2
BACKOFF_CAP_S = 10.0
HEALTHY_S = 30.0
FAILING_DEATHS = 5
LOG_LIMIT_BYTES = 10 * 1024 * 1024


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


@dataclass
class Restarts:
    """When a dead child may start again. Pure: durations in, durations out."""

    count: int = 0
    unready_deaths: int = 0
    """Deaths since it was ready last."""
    delay_s: float = 0.0

    def died(self, ready_for_s: float | None) -> float:
        """Note a death; returns the delay before the next start. ready_for_s: None if never ready.

        The delay doubles while the child keeps dying and starts over once it was healthy for
        ten times that delay, or 30 s: waiting costs it a tenth of its time at most.
        """
        self.count += 1
        self.unready_deaths += ready_for_s is None
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
                preexec_fn=end_with_parent(os.getpid()),
            )
        self.started, self.ready_s = now, None
        self.start = start_of(self.process.pid) or 0.0

    def send(self, signum: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            send_signal(self.process.pid, signum)

    def got_ready(self, now: float) -> float:
        """Returns how long it took."""
        self.restarts.unready_deaths = 0
        self.ready_s = now - self.started
        return self.ready_s

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
