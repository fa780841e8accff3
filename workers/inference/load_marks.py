"""Which models' loads never ended: their process crashed, hung or was killed.

A mark is a file, locked for as long as the load goes on, by whichever worker of the machine. One that nobody has locked
is of a load that took its process down, and would take down the next one too.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LoadMarks:
    """Models are `name/version`. A disk that takes no marks keeps no model from being loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def left(self) -> set[str]:
        left = set()
        with suppress(OSError):
            for path in self._folder.iterdir():
                if (fd := _locked(path, os.O_RDWR)) is not None:
                    os.close(fd)
                    left.add(path.name.replace("@", "/"))
        return left

    @contextmanager
    def loading(self, model: str) -> Iterator[None]:
        path = self._folder / model.replace("/", "@")
        fd = None
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            fd = _locked(path, os.O_RDWR | os.O_CREAT)
        try:
            yield
        finally:
            if fd is not None:
                path.unlink(missing_ok=True)
                os.close(fd)


def _locked(path: Path, flags: int) -> int | None:
    """None if another load has it."""
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
