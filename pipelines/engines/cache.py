"""The engine cache: compiled artefacts by the hash of all that they depend on. Knows no backend.

    objects/<key[:2]>/<key>/artefact/…      the backend's files
                           /manifest.json   their SHA-256, written last
    building/<key>.…                        a build under way, its lock, or how it failed

An entry is put in place, replaced or evicted only under its key's lock, and removed only while
nobody has a lease on it. It appears by a rename, so it is there as a whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from infra.logs import get_logger
from pipelines.engines.locks import Lease, exclusive
from pipelines.engines.manifest import ARTEFACT, fault_of, read_json, seal, write_json
from schemas.errors import InvalidModel, Transient

Build = Callable[[Path], None]

_log = get_logger("engines")


class Artefact(NamedTuple):
    """A folder of files that stays as it is until released."""

    path: Path
    lease: Lease

    def release(self) -> None:
        self.lease.release()


class Failure(Struct, frozen=True):
    """A build that failed for good. at: seconds since the epoch."""

    code: str
    message: str
    at: float


class EngineCache:
    """On a local disk, shared by any number of threads and processes of one host.

    max_bytes: what the entries may take together; the least recently used leave first. One that is
    leased stays even beyond that. build_wait_s: how long to wait for somebody else's build of the
    same key. failure_memory_s: how long a failed build is not tried again.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        *,
        build_wait_s: float = 600,
        failure_memory_s: float = 300,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._build_wait_s = build_wait_s
        self._failure_memory_s = failure_memory_s
        self._clock = clock
        self._objects = root / "objects"
        self._building = root / "building"

    def get_or_build(
        self,
        key_parts: dict[str, object],
        build: Build,
        *,
        force: bool = False,
        on_wait: Callable[[], None] | None = None,
    ) -> Artefact:
        """The artefact for these parts, built at most once however many ask for it at a time.

        key_parts: JSON-able, all that the artefact depends on. build: fills the empty folder it is
        given. force: try again what failed a moment ago. on_wait: called once if somebody else is
        building. The caller releases the artefact when it needs the files no longer.
        Raises what `build` raises, InvalidModel if it failed a moment ago, and Transient
        (disk_full, engine_build_busy, engine_cache_unavailable).
        """
        key = key_of(key_parts)
        with self._disk():
            if artefact := self._find(key):
                return artefact
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._building.mkdir(exist_ok=True)
            with self._lock(key, self._build_wait_s, on_wait):
                if artefact := self._find(key):
                    return artefact
                if not force:
                    self._refuse_remembered(key)
                artefact = self._build(key, key_parts, build)
        self._tidy()
        return artefact

    def _find(self, key: str) -> Artefact | None:
        entry = self._entry(key)
        lease = Lease.take(entry)
        if lease is None:
            return None
        if fault := fault_of(entry, key):
            _log.warning("engine_cache_entry_rejected", key=key, reason=fault)
            lease.release()
            return None
        with suppress(OSError):  # a read-only cache remembers no last use
            os.utime(entry)
        return Artefact(entry / ARTEFACT, lease)

    def _build(self, key: str, key_parts: dict[str, object], build: Build) -> Artefact:
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self._building))
        started = time.monotonic()
        try:
            (folder / ARTEFACT).mkdir()
            build(folder / ARTEFACT)
            seal(folder, key, key_parts)
            artefact = self._put(folder, key)
        except InvalidModel as error:
            self._remember(key, error)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._failure(key).unlink(missing_ok=True)
        _log.info("engine_built", key=key, seconds=round(time.monotonic() - started, 3))
        return artefact

    def _put(self, folder: Path, key: str) -> Artefact:
        """Move a sealed folder to its place, leased before anybody else can see and evict it."""
        lease = Lease.take(folder)
        assert lease is not None, "nobody else knows this folder"
        try:
            self._discard(key)
            entry = self._entry(key)
            entry.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(entry)
        except BaseException:
            lease.release()
            raise
        return Artefact(entry / ARTEFACT, lease)

    def _discard(self, key: str) -> None:
        """Remove an entry, under its lock. Whoever has its files open or mapped keeps them."""
        entry = self._entry(key)
        if entry.exists():
            doomed = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self._building))
            entry.rename(doomed)
            shutil.rmtree(doomed)

    def _remember(self, key: str, error: InvalidModel) -> None:
        with suppress(OSError):  # forgotten, it is only tried again sooner
            failure = Failure(error.code, error.message, self._clock())
            write_json(self._failure(key), failure)

    def _remembered(self, key: str) -> Failure | None:
        failure = read_json(self._failure(key), Failure)
        if failure and 0 <= self._clock() - failure.at < self._failure_memory_s:
            return failure
        return None

    def _refuse_remembered(self, key: str) -> None:
        if failure := self._remembered(key):
            left_s = failure.at + self._failure_memory_s - self._clock()
            raise InvalidModel(
                failure.code,
                f"{failure.message} (The build failed a moment ago; it is not tried again for "
                f"{left_s:.0f} s, unless forced.)",
            )

    def _tidy(self) -> None:
        try:
            self._clean()
            self._evict()
        except OSError as error:  # the engine is there; the next build tidies again
            _log.warning("engine_cache_not_tidied", root=str(self.root), reason=str(error))

    def _clean(self) -> None:
        """Remove what killed builders left, and failures that are old."""
        for path in self._building.iterdir():
            key, _, suffix = path.name.partition(".")
            with suppress(Transient), self._lock(key, wait_s=0):  # releasing removes the lock file
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif suffix == "partial" or (suffix == "failed" and not self._remembered(key)):
                    path.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Remove the least recently used entries until the rest fits; never a leased one."""
        entries = sorted((_last_use_ns(entry), entry) for entry in self._objects.glob("*/*"))
        sizes = {entry: _size_bytes(entry) for _, entry in entries}
        excess_bytes = sum(sizes.values()) - self._max_bytes
        for _, entry in entries:
            if excess_bytes <= 0:
                return
            if self._remove_unused(entry):
                excess_bytes -= sizes[entry]
                _log.info("engine_evicted", key=entry.name, bytes=sizes[entry])

    def _remove_unused(self, entry: Path) -> bool:
        with suppress(Transient), self._lock(entry.name, wait_s=0):
            if lease := Lease.take_alone(entry):
                self._discard(entry.name)
                lease.release()
                return True
        return False

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise Transient(
                "disk_full" if full else "engine_cache_unavailable",
                f"Expected to write compiled engines under {self.root}, got: {error}; "
                + ("free some space" if full else "check the disk and its permissions")
                + " or give the engine cache another folder.",
            ) from error

    def _lock(
        self, key: str, wait_s: float, on_wait: Callable[[], None] | None = None
    ) -> AbstractContextManager[None]:
        return exclusive(self._building / f"{key}.lock", wait_s, on_wait)

    def _entry(self, key: str) -> Path:
        return self._objects / key[:2] / key

    def _failure(self, key: str) -> Path:
        return self._building / f"{key}.failed"


def key_of(key_parts: dict[str, object]) -> str:
    canonical = json.dumps(key_parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _last_use_ns(entry: Path) -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # evicted meanwhile by somebody else
        return 0


def _size_bytes(entry: Path) -> int:
    total = 0
    for folder, _, names in os.walk(entry):
        with suppress(FileNotFoundError):
            total += sum(Path(folder, name).stat().st_size for name in names)
    return total
