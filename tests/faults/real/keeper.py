"""Keeps processes running, as an orchestrator would: what exits is started again after a while."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from infra.embedded.child import Restarts

LOOK_S = 0.02
READY_S = 90.0
STOP_S = 60.0


class TooLate(Exception):
    """What must come did not come."""


def until(
    condition: Callable[[], object], patience_s: float, what: str, look_s: float = LOOK_S
) -> float:
    """Returns the monotonic time when it was true. Raises TooLate."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TooLate(f"{what}: not within {patience_s:g} s")
        time.sleep(look_s)
    return time.monotonic()


@dataclass
class Kept:
    """One process to keep. ready: the file in which it says, with its pid, that it is ready for work.
    next: the command of the next start only."""

    command: list[str]
    environment: Mapping[str, str]
    ready: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    next: list[str] | None = None
    wanted: bool = True
    start_at: float = 0.0
    started: float = 0.0
    seen_ready: bool = False
    restarts: Restarts = field(default_factory=Restarts)
    exits: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        return self.process.pid if self.process and self.process.poll() is None else 0

    @property
    def is_ready(self) -> bool:
        try:
            said = json.loads(self.ready.read_bytes())["pid"]
        except (OSError, ValueError):
            return False
        return bool(self.pid) and said == self.pid


class Keeper:
    """folder: where each process gets a folder of its own, with its data and its output."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._root = root
        self._kept: dict[str, Kept] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper")
        self._thread.start()

    @property
    def names(self) -> list[str]:
        return [name for name, kept in list(self._kept.items()) if kept.wanted]

    def add(
        self, name: str, command: list[str], environment: Mapping[str, str], ready: str
    ) -> None:
        """ready: the name under which it announces itself."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        own = {**environment, "HEADRACE_DATA_DIR": str(home)}
        with self._lock:
            self._kept[name] = Kept(
                command, own, home / "run" / f"{ready}.ready", self.folder / f"{name}.log"
            )

    def remove(self, name: str) -> None:
        """Tell it to stop, and wait until it has."""
        kept = self._kept[name]
        kept.wanted = False
        self.signal(name, signal.SIGTERM)
        until(lambda: not kept.pid, STOP_S, f"{name} stops")
        with self._lock:
            del self._kept[name]

    def signal(self, name: str, signum: signal.Signals) -> int:
        """Returns the pid it had; nothing happens to one that does not run just now."""
        pid = self._kept[name].pid
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        return pid

    def pid(self, name: str) -> int:
        return self._kept[name].pid

    def exits(self, name: str) -> list[int]:
        """How it ended each time: an exit code, or a signal as a negative number."""
        return self._kept[name].exits

    def start_next_with(self, name: str, command: list[str]) -> None:
        """Its next start, and only that one, is with another command."""
        self._kept[name].next = command

    def until_ready(self, name: str, but: int = 0) -> float:
        """but: not the process with this pid. Returns the monotonic time when it was."""
        kept = self._kept[name]
        return until(lambda: kept.is_ready and kept.pid != but, READY_S, f"{name} is ready")

    def until_all_ready(self) -> None:
        for name in self.names:
            self.until_ready(name)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        running = [kept.process for kept in self._kept.values() if kept.pid]
        for process in running:
            if process:
                process.kill()
                process.wait()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            with self._lock:
                for kept in self._kept.values():
                    self._look_at(kept)

    def _look_at(self, kept: Kept) -> None:
        now = time.monotonic()
        if kept.process is None:
            if kept.wanted and now >= kept.start_at:
                self._start(kept, now)
            return
        if (status := kept.process.poll()) is None:
            kept.seen_ready = kept.seen_ready or kept.is_ready
            return
        kept.process = None
        kept.exits.append(status)
        kept.start_at = now + kept.restarts.died(now - kept.started if kept.seen_ready else None)

    def _start(self, kept: Kept, now: float) -> None:
        command, kept.next = kept.next or kept.command, None
        kept.started, kept.seen_ready = now, False
        with kept.log.open("ab") as out:
            kept.process = subprocess.Popen(
                command,
                cwd=self._root,
                env=dict(kept.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
