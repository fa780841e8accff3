"""Copies of a remote store's objects on this machine's disk: where workers read models from.

A copy is whole or absent. Several processes may share the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from schemas.errors import InvalidJob, Transient

UNFINISHED = "%unfinished"
"""The folder of copies under way and of files without a name. No key can name it."""

KEPT_S = 3600.0
"""A copy lives for this long after it was last asked for, however little room there is."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (FileExistsError, NotADirectoryError, IsADirectoryError)


class _Found(NamedTuple):
    used_at: float
    size_bytes: int
    path: Path


class LocalCopies:
    """limit_bytes: above it, copies that nobody has asked for in an hour go, oldest first.

    A copy's mtime says which version of the object it is (see `_stamp`), so that both change at once;
    its atime says when it was last asked for. Raises Transient (storage_full, storage_unavailable).
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._unfinished = folder / UNFINISHED
        self._limit_bytes = limit_bytes

    def find(self, key: str, version: str) -> Path | None:
        """The copy of this version of the object, if there is one."""
        path = self._folder / key
        with on_disk(key), suppress(FileNotFoundError, NotADirectoryError):
            if path.stat().st_mtime_ns == _stamp(version):
                os.utime(path, ns=(time.time_ns(), _stamp(version)))
                return path
        return None

    @contextmanager
    def written_aside(self, key: str) -> Iterator[BinaryIO]:
        """A file for `publish`. Afterwards it is gone, unless it was published."""
        aside = self._unfinished / uuid.uuid4().hex
        try:
            with ExitStack() as opened:
                with on_disk(key):
                    self._make_unfinished()
                    file = opened.enter_context(aside.open("x+b"))
                yield file
        finally:
            with suppress(OSError):
                aside.unlink()

    def publish(self, file: BinaryIO, key: str, version: str) -> Path:
        """What was written aside becomes the copy. Raises InvalidJob (object_key_invalid)."""
        path = self._folder / key
        with on_disk(key):
            file.flush()
            os.utime(file.fileno(), ns=(time.time_ns(), _stamp(version)))
            os.fsync(file.fileno())
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file.name, path)
            except _IN_THE_WAY:
                raise InvalidJob(
                    "object_key_invalid",
                    f"Object key {key}: it is a folder, or lies under an object; choose another.",
                ) from None
            self._make_room()
        return path

    def scratch(self, key: str) -> BinaryIO:
        """A file without a name: gone when it is closed."""
        with on_disk(key):
            self._make_unfinished()
            return tempfile.TemporaryFile(dir=self._unfinished)

    def forget(self, key: str) -> None:
        with suppress(OSError):
            (self._folder / key).unlink()

    def _make_unfinished(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._unfinished.mkdir(exist_ok=True)

    def _make_room(self) -> None:
        """What killed processes left unfinished goes with the rest."""
        found = sorted(self._walk())
        excess = sum(file.size_bytes for file in found) - self._limit_bytes
        oldest = time.time() - KEPT_S
        for file in found:
            if excess <= 0 or file.used_at > oldest:
                return
            with suppress(FileNotFoundError):
                file.path.unlink()
                excess -= file.size_bytes

    def _walk(self) -> Iterator[_Found]:
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    yield _Found(max(stat.st_atime, stat.st_mtime), stat.st_size, path)


def _stamp(version: str) -> int:
    """A version as an mtime in ns: a number of 48 bits, so a time in the first days of 1970."""
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:6], "big")


@contextmanager
def on_disk(key: str) -> Iterator[None]:
    """Translates what goes wrong with this machine's disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise Transient(
                "storage_full",
                f"Object {key}: no room on this machine to hold it: {error}; free disk space, or set"
                " HEADRACE_S3__CACHE_DIR to a larger disk.",
            ) from error
        raise Transient(
            "storage_unavailable", f"Object {key}: the cache folder does not answer: {error}"
        ) from error
