"""The object store in a folder: an object is the file at its key, written aside, then published."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from infra.objects import ObjectExists, ObjectInfo, check_content, check_key
from schemas.errors import InvalidJob, Transient
from schemas.payloads import Ref

UNFINISHED = "%unfinished"
"""The folder where objects are written. No key can name it: there is no '%' in a key."""

UNFINISHED_KEPT_S = 24 * 3600.0
"""What a killed writer left behind is deleted after this long without a write."""

CHUNK_BYTES = 1024 * 1024

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_HERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class FileObjects:
    """Implements `infra.objects.ObjectStore`. Any number of processes may share the folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._unfinished = root / UNFINISHED
        self._delete_leftovers()

    def put(self, key: str, data: bytes | BinaryIO | Path, *, if_absent: bool = False) -> Ref:
        target = self._path(key)
        with _opened(data) as source, self._written_aside(source, key) as (aside, ref):
            _publish(aside, target, key, if_absent)
        return ref

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self.open(key) as file, _translated(key):
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > max_bytes:
                raise InvalidJob(
                    "object_too_large",
                    f"Object {key}: expected at most {max_bytes} bytes, it has {size_bytes}.",
                )
            return file.read(size_bytes)

    def fetch(self, ref: Ref) -> bytes:
        return check_content(ref, self.get(ref.key, max_bytes=ref.size_bytes))

    def fetch_into(self, ref: Ref, file: BinaryIO) -> None:
        file.write(self.fetch(ref))

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with _translated(key):
            try:
                return path.open("rb")
            except _NOT_HERE:
                raise _missing(key) from None

    def local(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise _missing(key)
        return path

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        with _translated(folder):
            yield from self._walk(f"{check_key(folder)}/" if folder else "")

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _translated(key), suppress(*_NOT_HERE):
            path.unlink()
            _sync(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _written_aside(self, source: BinaryIO, key: str) -> Iterator[tuple[Path, Ref]]:
        """The data on disk where no key leads to it, and what to call it. Afterwards it is gone,
        unless it was moved."""
        aside = self._unfinished / uuid.uuid4().hex
        try:
            with _translated(key):
                _make_folder(self._unfinished)
                file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                size_bytes, digest = _copy(source, file, key)
            finally:
                os.close(file)
            yield aside, Ref(key, size_bytes, digest)
        finally:
            with suppress(OSError):
                aside.unlink()

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self._root / prefix) as entries,
        ):
            for entry in entries:
                key = prefix + entry.name
                if entry.is_dir():
                    if key != UNFINISHED:
                        yield from self._walk(f"{key}/")
                    continue
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield ObjectInfo(key, stat.st_size, stat.st_mtime)

    def _delete_leftovers(self) -> None:
        """A file that is being written has a young mtime, whichever process writes it."""
        oldest = time.time() - UNFINISHED_KEPT_S
        with suppress(OSError), os.scandir(self._unfinished) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < oldest:
                        os.unlink(entry)


def _opened(data: bytes | BinaryIO | Path) -> AbstractContextManager[BinaryIO]:
    if isinstance(data, bytes):
        return io.BytesIO(data)
    return data.open("rb") if isinstance(data, Path) else nullcontext(data)


def _copy(source: BinaryIO, file: int, key: str) -> tuple[int, str]:
    """Write all of source and see it on disk. Returns size in bytes and SHA-256."""
    digest = hashlib.sha256()
    size_bytes = 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
        with _translated(key):
            _write(file, chunk)
    with _translated(key):
        os.fsync(file)
    return size_bytes, digest.hexdigest()


def _publish(aside: Path, target: Path, key: str, if_absent: bool) -> None:
    with _translated(key):
        try:
            _make_folder(target.parent)
            os.link(aside, target) if if_absent else os.replace(aside, target)
        except FileExistsError:
            raise ObjectExists(key) from None
        except (NotADirectoryError, IsADirectoryError):
            raise InvalidJob(
                "object_key_invalid",
                f"Object key {key}: it is a folder, or lies under an object; choose another.",
            ) from None
        _sync(target.parent)


def _write(file: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(file, rest) :]


def _make_folder(folder: Path) -> None:
    """Make it and those above it; each that is new is on disk on return."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(*error.args) from None
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    """A new name is on disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise Transient(
                "storage_full",
                f"Object {key}: no room to store it: {error}; free disk space.",
            ) from error
        raise Transient(
            "storage_unavailable", f"Object {key}: the store's folder does not answer: {error}"
        ) from error


def _missing(key: str) -> InvalidJob:
    return InvalidJob("object_missing", f"Object {key}: there is none; put it first.")
