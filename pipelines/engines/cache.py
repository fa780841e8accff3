"""The engine cache: compiled artefacts by the hash of all that they depend on. Knows no backend.

Two tiers: this machine's disk (`disk.py`), and the fleet's object store (`store.py`) if there is one.
How a miss becomes a hit is in `flight.py`. A hit is on the way of every cold start: what only a miss needs, of the
standard library too, is imported when there is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from infra.logs import get_logger
from pipelines.engines.disk import Disk, DiskEntry, errors_of_disk
from pipelines.engines.failures import Failure
from pipelines.engines.locks import Lease
from pipelines.engines.manifest import ARTEFACT, Rejected, key_of
from pipelines.engines.order import Build, Order, Policy, Trace
from pipelines.engines.signing import Keyring
from schemas.errors import Transient

if TYPE_CHECKING:
    from pipelines.engines.store import EngineStore

_log = get_logger("engines")


class Artefact(NamedTuple):
    """A folder of files that stays as it is until released."""

    path: Path
    lease: Lease
    trace: Trace

    def release(self) -> None:
        self.lease.release()


class EngineCache:
    """Shared by any number of threads and processes of one host, and by hosts through the store.

    max_bytes: what the entries on this disk may take together; the least recently used leave first.
    One that is leased stays even beyond that. build_wait_s: how long to wait for somebody else's
    build of the same key. failure_memory_s: how long a failed build is not tried again.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        *,
        keyring: Keyring | None = None,
        store: EngineStore | None = None,
        build_wait_s: float = 600,
        failure_memory_s: float = 300,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.store = store
        self.keyring = keyring or Keyring()
        self.disk = Disk(root, self.keyring)
        self._max_bytes = max_bytes
        self._replaced: set[str] = set()
        self._policy = Policy(build_wait_s, failure_memory_s, clock)

    def get_or_build(
        self,
        key_parts: dict[str, object],
        build: Build,
        *,
        label: str = "",
        force: bool = False,
        rebuild: bool = False,
        may_build: bool = True,
        on_wait: Callable[[], None] | None = None,
    ) -> Artefact:
        """The artefact for these parts, built at most once however many ask for it at a time.

        key_parts: JSON-able, all that the artefact depends on. The others: see `Order`. The caller
        releases the artefact when it needs the files no longer.
        Raises what `build` raises, InvalidModel if it failed a moment ago, and Transient
        (disk_full, engine_build_busy, engine_not_built, engine_cache_unavailable).
        """
        key = key_of(key_parts)
        with errors_of_disk(self.root):
            if not rebuild and (lease := self.disk.find(key)):
                return self._artefact(lease, Trace(key=key))
            order = Order(
                key=key,
                key_parts=key_parts,
                build=build,
                label=label,
                force=force or rebuild,
                rebuild=rebuild,
                may_build=may_build,
                on_wait=on_wait,
            )
            from pipelines.engines.flight import Flight

            flight = Flight(order, self.disk, self.store, self.keyring, self._policy)
            lease = flight.run()
        _log.info("engine_obtained", label=label, **msgspec.to_builtins(flight.trace))
        if flight.trace.origin == "built":
            self._tidy()
        elif flight.trace.origin == "store":  # who fetches an engine is in a hurry
            threading.Thread(target=self._tidy, name="engine-tidy", daemon=True).start()
        return self._artefact(lease, flight.trace)

    def share(self, key: str) -> bool:
        """Copy an engine of this machine to the object store, if that has none, or one with a manifest
        that is not to be believed. If it has one, that is one small request. Raises StoreUnavailable,
        and Transient (engine_rejected) if it is found to be damaged; it is removed then."""
        if self.store is None:
            return False
        there = self.store.manifest(key)
        # Replaced once: a builder with other keys would do the same to ours.
        if there and (key in self._replaced or self._is_believed(self.store, there, key)):
            return False
        with errors_of_disk(self.root):
            lease = self.disk.find(key)
            if lease is None:
                return False
            try:
                shared = self.store.publish(key, self.disk.entry(key), replace=there is not None)
                if there is not None:
                    self._replaced.add(key)
                return shared
            except Rejected as reason:
                self.disk.verify(key, self._policy.wait_s)
                raise Transient(
                    "engine_rejected",
                    f"Expected the engine {key} as it was built: {reason}. It is removed, and built"
                    " anew when it is next asked for.",
                ) from reason
            finally:
                lease.release()

    def prune(self, max_bytes: int | None = None, *, dry_run: bool = False) -> list[DiskEntry]:
        """Remove from this disk what killed builders left, old failures, and the least recently used
        entries until the rest fits. max_bytes: instead of the cache's own. Raises Transient."""
        with errors_of_disk(self.root):
            if not dry_run:
                self.disk.clean(self._is_old)
            limit = self._max_bytes if max_bytes is None else max_bytes
            return self.disk.evict(limit, self._policy.clock(), dry_run=dry_run)

    def _is_believed(self, store: EngineStore, signed: bytes, key: str) -> bool:
        try:
            store.check(signed, key)
        except Rejected as reason:
            _log.warning("engine_store_entry_rejected", key=key, reason=str(reason))
            return False
        return True

    def _artefact(self, lease: Lease, trace: Trace) -> Artefact:
        return Artefact(self.disk.entry(trace.key) / ARTEFACT, lease, trace)

    def _tidy(self) -> None:
        try:
            for entry in self.prune():
                _log.info("engine_evicted", key=entry.key, bytes=entry.size_bytes)
        except Transient as error:  # the engine is there; the next build tidies again
            _log.warning("engine_cache_not_tidied", reason=error.message)

    def _is_old(self, failure: Failure) -> bool:
        return failure.left_s(self._policy.clock(), self._policy.failure_memory_s) <= 0
