"""What is known of the stack on a data folder: who holds it, what runs. Read by every command."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from infra.embedded import write_whole
from infra.embedded.processes import start_of
from infra.settings import Settings
from schemas.errors import PipelineError

State = Literal["waiting", "starting", "ready", "restarting", "failing", "stopped"]


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


class StackState(Struct, frozen=True):
    """What `run/stack.json` says. start: with pid, the supervisor's identity (`start_of`).

    started_at: seconds since the epoch. redis: "embedded", or "external" where a URL is set.
    ready_s: from the start until all children were ready for the first time; None until then.
    """

    pid: int
    start: float
    started_at: float
    version: str
    redis: Literal["embedded", "external"]
    stopping: bool = False
    ready_s: float | None = None
    children: list[ChildState] = []

    @property
    def healthy(self) -> bool:
        return not self.stopping and all(child.state == "ready" for child in self.children)


def running_stack(settings: Settings) -> StackState | None:
    """The stack that runs on this data folder now, or None."""
    state = recorded_stack(settings)
    return state if state and start_of(state.pid) == state.start else None


def recorded_stack(settings: Settings) -> StackState | None:
    """The stack that was written down last, alive or killed; None after a clean stop."""
    try:
        return msgspec.json.decode(state_file(settings).read_bytes(), type=StackState)
    except (OSError, msgspec.DecodeError):
        # None, or the record of another version of headrace.
        return None


def state_file(settings: Settings) -> Path:
    return settings.data_dir / "run" / "stack.json"


@contextmanager
def held(settings: Settings) -> Iterator[Callable[[], bool]]:
    """Hold the data folder's lock. The kernel frees it when we die, however that happens.

    Gives a function that says whether the folder is still the one we hold: somebody may have
    removed it. Makes the folders. Raises PipelineError (stack_running) if another process holds it.
    """
    for folder in (settings.data_dir, settings.data_dir / "run", settings.data_dir / "logs"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = settings.data_dir / "run" / "lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise stack_running(settings, lock.read().strip()) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        ours = os.fstat(lock.fileno())

        def in_place() -> bool:
            try:
                return os.path.samestat(path.stat(), ours)
            except OSError:
                return False

        yield in_place


def stack_running(settings: Settings, pid: object) -> PipelineError:
    return PipelineError(
        "stack_running",
        f"Expected no stack on {settings.data_dir}, but one is running (pid {pid}). Stop it with "
        "`headrace down`, or choose another folder with --data.",
    )


class Record:
    """Keeps `run/stack.json` true. Owned by the supervisor's process."""

    def __init__(self, settings: Settings, version: str) -> None:
        self._file = state_file(settings)
        self._began = time.monotonic()
        self._state = StackState(
            pid=os.getpid(),
            start=start_of(os.getpid()) or 0.0,
            started_at=time.time(),
            version=version,
            redis="external" if settings.redis_url.get_secret_value() else "embedded",
        )

    def update(self, children: list[ChildState], stopping: bool = False) -> float | None:
        """Write down what is new. Returns ready_s when the stack just got ready, else None."""
        now = msgspec.structs.replace(self._state, children=children, stopping=stopping)
        if now == self._state:
            return None
        first = now.ready_s is None and now.healthy
        if first:
            now = msgspec.structs.replace(now, ready_s=time.monotonic() - self._began)
        self._state = now
        # A full disk must not end the stack; the record is written again at the next change.
        with suppress(OSError):
            write_whole(self._file, now)
        return now.ready_s if first else None

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)
