"""Locks of the engine cache, between threads and processes of one host: flock on a local disk.

The kernel drops them with the process that holds them, so a killed one never leaves any behind.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schemas.errors import Transient

_POLL_S = 0.02


@contextmanager
def exclusive(
    path: Path, wait_s: float, on_wait: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the lock file `path`; it is gone again afterwards.

    on_wait: called once if somebody else holds it. Raises Transient if that lasts over wait_s.
    """
    give_up_at = time.monotonic() + wait_s
    fd = _try_lock(path)
    if fd is None and on_wait:
        on_wait()
    while fd is None:
        if time.monotonic() >= give_up_at:
            raise Transient(
                "engine_build_busy",
                f"Expected another builder to finish within {wait_s:g} s, it has not; try later.",
            )
        time.sleep(_POLL_S)
        fd = _try_lock(path)
    os.ftruncate(fd, 0)  # what a killed holder wrote there
    try:
        yield
    finally:
        with suppress(OSError):  # it stays where the disk has become read-only, which does no harm
            path.unlink()  # before letting go: nobody may lock a file about to vanish
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock file, which must be there."""
    fd = os.open(path, os.O_RDWR)
    try:
        return not _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) and _still_at(path, fd):
        return fd
    os.close(fd)
    return None


class Lease:
    """A shared lock on a folder: it is in use and must stay. It follows the folder when renamed."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @classmethod
    def take(cls, folder: Path) -> Lease | None:
        """None if the folder is not there, or is just being removed."""
        return cls._lock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @classmethod
    def take_alone(cls, folder: Path) -> Lease | None:
        """None if the folder is not there or anybody else has a lease on it."""
        return cls._lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @classmethod
    def _lock(cls, folder: Path, how: int) -> Lease | None:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if _flock(fd, how) and _still_at(folder, fd):
            return cls(fd)
        os.close(fd)
        return None

    def is_of(self, folder: Path) -> bool:
        """Whether the folder at this path is still the leased one, not a successor."""
        return self._fd is not None and _still_at(folder, self._fd)

    def release(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _flock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    return True


def _still_at(path: Path, fd: int) -> bool:
    """Whether the path still names the locked file, and not a successor or nothing."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
