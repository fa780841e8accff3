"""The engine cache's part on this machine's disk, shared by all its threads and processes.

    objects/<key[:2]>/<key>/artefact/…      the backend's files
                           /manifest.json   their SHA-256, signed, written last
    building/<key>.…                        a build or download under way, its lock, or how it failed

An entry is put in place, replaced or evicted only under its key's lock, and removed only while
nobody has a lease on it. It appears by a rename, so it is there as a whole or not at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from infra.logs import get_logger
from pipelines.engines.failures import Failure
from pipelines.engines.locks import Lease, exclusive
from pipelines.engines.manifest import ARTEFACT, Rejected, check, read_json, write_json
from pipelines.engines.signing import Keyring
from schemas.errors import Transient

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = get_logger("engines")


class DiskEntry(NamedTuple):
    """used_at: seconds since the epoch."""

    key: str
    size_bytes: int
    used_at: float


class Disk:
    """Raises OSError; `errors_of_disk` says what that means."""

    def __init__(self, root: Path, keyring: Keyring) -> None:
        self.root = root
        self._keyring = keyring
        self._objects = root / "objects"
        self._building = root / "building"

    def entry(self, key: str) -> Path:
        return self._objects / key[:2] / key

    def find(self, key: str) -> Lease | None:
        """A lease on the entry, if it is there and may be served."""
        entry = self.entry(key)
        lease = Lease.take(entry)
        if lease is None:
            return None
        try:
            check(entry, key, self._keyring)
        except Rejected as reason:
            _log.warning("engine_cache_entry_rejected", key=key, reason=str(reason))
            lease.release()
            return None
        if not lease.is_of(entry):  # what was checked has just taken the place of what is leased
            lease.release()
            return None
        with suppress(OSError):  # a read-only cache remembers no last use
            os.utime(entry)
        return lease

    def lock(
        self, key: str, wait_s: float, on_wait: Callable[[], None] | None = None
    ) -> AbstractContextManager[None]:
        """This machine's right to change the entry. Raises Transient if it is not to be had in time."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._building.mkdir(exist_ok=True)
        return exclusive(self._lock_file(key), wait_s, on_wait)

    def say_building(self, key: str) -> None:
        """Under its lock: that the entry is being built, which takes long."""
        self._lock_file(key).write_bytes(b"building")

    def is_building(self, key: str) -> bool:
        """Whether who has the lock builds. Only for those who did not get it."""
        with suppress(OSError):
            return self._lock_file(key).stat().st_size > 0
        return False

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A folder to make an entry in. Afterwards it is gone, unless it was put in its place."""
        import shutil  # not at the top: see cache.py
        import tempfile

        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self._building))
        try:
            (folder / ARTEFACT).mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, key: str) -> Lease:
        """Move a sealed folder to its place, leased before anybody else can see and evict it."""
        lease = Lease.take(folder)
        assert lease is not None, "nobody else knows this folder"
        try:
            entry = self.entry(key)
            entry.parent.mkdir(parents=True, exist_ok=True)
            replaced = self._set_aside(key)
            folder.rename(entry)
            _delete(replaced)
        except BaseException:
            lease.release()
            raise
        return lease

    def discard(self, key: str) -> None:
        """Remove an entry, under its lock. Whoever has its files open or mapped keeps them."""
        _delete(self._set_aside(key))

    def verify(self, key: str, wait_s: float) -> str | None:
        """What is wrong with the entry, compared in full. It is removed then; the next load fetches or
        builds it anew. Raises Transient if somebody is at work on it."""
        with self.lock(key, wait_s):
            try:
                check(self.entry(key), key, self._keyring, full=True)
            except Rejected as reason:
                self.discard(key)
                return str(reason)
        return None

    def remember(self, key: str, failure: Failure) -> None:
        with suppress(OSError):  # forgotten, it is only tried again sooner
            write_json(self._failed(key), failure)

    def failure(self, key: str) -> Failure | None:
        return read_json(self._failed(key), Failure)

    def forget(self, key: str) -> None:
        with suppress(OSError):
            self._failed(key).unlink()

    def entries(self) -> list[DiskEntry]:
        """The least recently used first."""
        entries = [
            DiskEntry(entry.name, _size_bytes(entry), used_at)
            for entry in self._objects.glob("*/*")
            if (used_at := _last_use(entry)) is not None
        ]
        return sorted(entries, key=lambda entry: entry.used_at)

    def failures(self) -> Iterator[tuple[str, Failure]]:
        for path in sorted(self._building.glob("*.failed")):
            if failure := self.failure(path.stem):
                yield path.stem, failure

    def evict(self, max_bytes: int, now: float, *, dry_run: bool = False) -> list[DiskEntry]:
        """Remove the least recently used entries until the rest fits; never a leased one.

        What was used in the future, by a clock that went back, comes first: or it would stay until then.
        """
        entries = sorted(self.entries(), key=lambda entry: entry.used_at <= now)
        excess_bytes = sum(entry.size_bytes for entry in entries) - max_bytes
        evicted = []
        for entry in entries:
            if excess_bytes <= 0:
                break
            spared = self.is_leased(entry.key) if dry_run else not self._remove_unused(entry.key)
            if not spared:
                excess_bytes -= entry.size_bytes
                evicted.append(entry)
        return evicted

    def clean(self, is_old: Callable[[Failure], bool]) -> None:
        """Remove what killed builders left, and failures that are old."""
        for path in self._building.glob("*"):
            key, _, suffix = path.name.partition(".")
            with suppress(Transient), self.lock(key, wait_s=0):
                failure = self.failure(key) if suffix == "failed" else None
                if suffix != "lock" and (failure is None or is_old(failure)):
                    _delete(path)  # a lock file goes when it is released

    def _set_aside(self, key: str) -> Path:
        """Where the entry is now, if there was one."""
        aside = self._building / f"{key}.{os.urandom(8).hex()}"  # no folder: the disk may be full
        with suppress(FileNotFoundError):
            self.entry(key).rename(aside)
        return aside

    def _remove_unused(self, key: str) -> bool:
        with suppress(Transient), self.lock(key, wait_s=0):
            if lease := Lease.take_alone(self.entry(key)):
                try:
                    self.discard(key)
                finally:
                    lease.release()
                return True
        return False

    def is_leased(self, key: str) -> bool:
        """Whether somebody has the entry loaded, or is at work on it. Looked at under the lock: who
        looks for the entry meanwhile waits for that."""
        with suppress(Transient), self.lock(key, wait_s=0):
            if lease := Lease.take_alone(self.entry(key)):
                lease.release()
                return False
        return True

    def _lock_file(self, key: str) -> Path:
        return self._building / f"{key}.lock"

    def _failed(self, key: str) -> Path:
        return self._building / f"{key}.failed"


@contextmanager
def errors_of_disk(root: Path) -> Iterator[None]:
    """Raises Transient (disk_full, engine_cache_unavailable) for what goes wrong on the disk."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        raise Transient(
            "disk_full" if full else "engine_cache_unavailable",
            f"Expected to write compiled engines under {root}, got: {error}; "
            + ("free some space" if full else "check the disk and its permissions")
            + " or give the engine cache another folder (HEADRACE_ENGINES__CACHE_DIR).",
        ) from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path, ignore_errors=True)  # what is left of it goes with the next `clean`
    else:
        path.unlink(missing_ok=True)


def _last_use(entry: Path) -> float | None:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # evicted meanwhile by somebody else
        return None


def _size_bytes(entry: Path) -> int:
    total = 0
    for folder, _, names in os.walk(entry):
        with suppress(FileNotFoundError):
            total += sum(Path(folder, name).stat().st_size for name in names)
    return total
