"""The right to build an engine, among machines that share an object store.

A lease is an object that only one can create, and that its holder writes anew while it builds. Whoever
waits watches it by its own clock that only goes forward: a lease that stays as it is for as long as it
says itself is over, and is taken. Clocks of different machines are never compared.

It spares work and protects nothing: two who believe to hold it build twice, and publish whole entries.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

import msgspec
from msgspec import Struct

from infra.logs import get_logger
from infra.objects import ObjectExists, ObjectStore
from pipelines.engines.manifest import UNDECODABLE
from pipelines.engines.reach import StoreUnavailable, reached
from schemas.errors import InvalidJob

_LIMIT_BYTES = 4096

_log = get_logger("engines")


class _Content(Struct, frozen=True):
    """builder: one attempt to build. host: the cache folder it builds for. beat: counts its writes."""

    builder: str
    host: str
    beat: int
    lease_s: float


class BuildLease:
    """object_key: where it lies. host: names the cache folder whose lock of this key the caller holds.
    A lease of the same host is of a builder that died: or it would hold that lock, or what it built
    would be there.

    Raises StoreUnavailable.
    """

    def __init__(
        self,
        objects: ObjectStore,
        object_key: str,
        host: str,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objects = objects
        self._object_key = object_key
        self._mine = _Content(uuid.uuid4().hex, host, 0, lease_s)
        self._clock = clock
        self._seen: _Content | None = None
        self._seen_at = 0.0
        self._released = threading.Event()
        self._beats: threading.Thread | None = None

    def take(self) -> bool:
        """Try once, without waiting; ask again for as long as somebody else has it. True: it is held,
        and renewed until it is released."""
        if found := self._read():
            if not self._is_over(found):
                return False
            _log.warning("engine_lease_taken_over", lease=self._object_key, of=found.host)
            with reached():
                self._objects.delete(self._object_key)
        try:
            self._write(if_absent=True)
        except ObjectExists:
            return False
        self._beats = threading.Thread(target=self._renew, name="engine-lease", daemon=True)
        self._beats.start()
        return True

    def release(self) -> None:
        """Does nothing unless it is held. What cannot be deleted is over after its time, for which a
        store that does not answer is waited for too."""
        if self._beats is None:
            return
        self._released.set()
        self._beats.join(self._mine.lease_s)
        try:
            if self._beats.is_alive():
                raise StoreUnavailable("engine_store_unavailable", "it does not answer")
            if self._is_mine(self._read()):
                with reached():
                    self._objects.delete(self._object_key)
        except StoreUnavailable as error:
            _log.warning("engine_lease_not_released", lease=self._object_key, reason=str(error))

    def _is_over(self, found: _Content) -> bool:
        if found.host == self._mine.host:
            return True
        if found != self._seen:
            self._seen, self._seen_at = found, self._clock()
        return self._clock() - self._seen_at >= found.lease_s

    def _renew(self) -> None:
        while not self._released.wait(self._mine.lease_s / 4):
            try:
                if not self._is_mine(self._read()):
                    _log.warning("engine_lease_lost", lease=self._object_key)
                    return
                self._mine = msgspec.structs.replace(self._mine, beat=self._mine.beat + 1)
                self._write()
            except StoreUnavailable as error:
                _log.warning("engine_lease_not_renewed", lease=self._object_key, reason=str(error))

    def _is_mine(self, found: _Content | None) -> bool:
        return found is not None and found.builder == self._mine.builder

    def _write(self, *, if_absent: bool = False) -> None:
        with reached():
            self._objects.put(
                self._object_key, msgspec.json.encode(self._mine), if_absent=if_absent
            )

    def _read(self) -> _Content | None:
        try:
            with reached():
                data = self._objects.get(self._object_key, max_bytes=_LIMIT_BYTES)
            return msgspec.json.decode(data, type=_Content)
        except InvalidJob:
            return None
        except UNDECODABLE:
            return _Content("", "", 0, self._mine.lease_s)
