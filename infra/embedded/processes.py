"""What the supervisor asks of the operating system: who a process is, how it ended, signals."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start_of(pid: int) -> float | None:
    """When the process started: with its pid an identity that is never reused. None if it is dead.

    On Linux in clock ticks since boot, because the wall clock may be set while it runs.
    """
    if sys.platform != "linux":
        import psutil

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


def age_s(pid: int) -> float:
    """How long ago the process started, to a hundredth of a second. Raises ProcessLookupError if it is dead."""
    start = start_of(pid)
    if start is None:
        raise ProcessLookupError(pid)
    if sys.platform != "linux":
        return time.time() - start
    # psutil's is off by up to a second: the kernel tells when it booted in whole ones.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")


def send_signal(pid: int, signum: signal.Signals) -> None:
    """Signal a process that leads a session of its own, if it is there; SIGKILL takes along
    whatever it started."""
    with suppress(ProcessLookupError):
        if signum == signal.SIGKILL:
            os.killpg(pid, signum)
        else:
            os.kill(pid, signum)


def describe_exit(exit_status: int) -> str:
    """exit_status: as Popen.returncode has it, negative for a signal."""
    if exit_status >= 0:
        return f"exit code {exit_status}"
    try:
        return f"killed by {signal.Signals(-exit_status).name}"
    except ValueError:
        return f"killed by signal {-exit_status}"


def end_with_parent(parent: int) -> Callable[[], None] | None:
    """A function to run between fork and exec: on Linux the kernel sends the child SIGTERM when
    its parent dies, even by SIGKILL. None elsewhere."""
    if _LIBC is None:
        return None

    def arrange() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


class StopSignals:
    """Counts requests to stop, and sleeps until any signal, the end of a child included.

    A context manager for the main thread. Signals that are ignored (`nohup`) stay ignored.
    """

    def __init__(self) -> None:
        self.requests = 0

    def __enter__(self) -> StopSignals:
        self._wake, self._woken = os.pipe()
        for end in (self._wake, self._woken):
            os.set_blocking(end, False)
        self._earlier_fd = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._earlier = {signal.SIGCHLD: signal.signal(signal.SIGCHLD, lambda *_: None)}
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._earlier[signum] = signal.signal(signum, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._earlier_fd)
        os.close(self._wake)
        os.close(self._woken)

    def wait(self, timeout_s: float) -> None:
        readable, _, _ = select.select([self._wake], [], [], timeout_s)
        if readable:
            os.read(self._wake, 4096)

    def _count(self, _signum: int, _frame: FrameType | None) -> None:
        self.requests += 1
