"""The engine cache's part in the object store, shared by all machines of a fleet.

    engines/<key[:2]>/<key>/<sha256>        a piece of a file of the artefact, by what is in it
                           /manifest.json   the files' names, signed, written last
                           /lease.json      while a machine builds it
                           /failed.json     how the last build failed
                           /used            written anew whenever a machine fetches it

Pieces are named by their content, so two machines that publish builds of the same key at once never
mix them: whose manifest is first, has made the entry.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
from msgspec import Struct

from infra.logs import get_logger
from infra.objects import ObjectExists, ObjectInfo, ObjectStore
from pipelines.engines.failures import Failure
from pipelines.engines.leases import BuildLease
from pipelines.engines.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    PIECE_BYTES,
    UNDECODABLE,
    FileEntry,
    Manifest,
    Rejected,
    open_manifest,
    pieces_of,
)
from pipelines.engines.reach import StoreUnavailable, reached
from pipelines.engines.signing import Keyring
from schemas.errors import InvalidJob, PipelineError
from schemas.payloads import Ref

FOLDER = "engines"
LEASE, FAILED, USED = "lease.json", "failed.json", "used"

AT_ONCE = 4
"""Pieces that are on their way at a time: while one is asked for or ends, the others keep the line busy."""

AFTER_S = 0.01
"""So much later than the last piece the use is noted: what is made of the pieces is not to wait for it."""

IN_USE_S = 3600.0
"""An entry that was built or fetched so recently, or a lease so young, is not pruned."""


_log = get_logger("engines")


class StoreEntry(Struct, frozen=True):
    """What lies under one key. whole: it has a manifest. used_at: by the store's clock, seconds since
    the epoch; a machine that has the engine on its own disk does not touch it."""

    key: str
    size_bytes: int
    used_at: float
    whole: bool
    building: bool


class _Piece(NamedTuple):
    offset: int
    size_bytes: int
    sha256: str


class EngineStore:
    """Raises StoreUnavailable. keyring: with at least one key; what machines exchange is signed.

    lease_s: how long a machine that builds may go without a sign of life.
    """

    def __init__(self, objects: ObjectStore, keyring: Keyring, *, lease_s: float = 30) -> None:
        if not keyring:
            raise PipelineError(
                "settings_invalid",
                "Engines in the object store: expected at least one key to sign them with, there is"
                " none; set HEADRACE_ENGINES__KEYS or HEADRACE_ENGINES__KEYS_FILE.",
            )
        self._objects = objects
        self._keyring = keyring
        self._lease_s = lease_s

    def manifest(self, key: str) -> bytes | None:
        """As it was signed; not checked yet."""
        return self._read(key, MANIFEST, MANIFEST_LIMIT_BYTES)

    def check(self, signed: bytes, key: str) -> Manifest:
        """Raises Rejected."""
        return open_manifest(signed, key, self._keyring)

    def download(self, signed: bytes, key: str, folder: Path) -> None:
        """Write the files of a manifest. Raises Rejected unless it and they are good, and OSError; what
        is written then is worth nothing. A manifest with damaged files is taken away."""
        from concurrent.futures import ThreadPoolExecutor  # not at the top: see cache.py

        pieces = []
        for name, file in self.check(signed, key).files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            pieces += [(path, piece) for piece in _pieces(file)]
        with (
            self._withdrawn_if_damaged(key, signed),
            ThreadPoolExecutor(AT_ONCE, "engine") as pool,
        ):
            for _ in pool.map(lambda wanted: self._fetch(key, *wanted), pieces):
                pass  # the first that fails ends the rest
        self._note_use(key)

    def publish(self, key: str, entry: Path, *, replace: bool = False) -> bool:
        """Copy an entry of this machine to the store. False: there is one already.

        replace: what is there was rejected. Raises Rejected if the entry is damaged, and OSError.
        """
        signed = (entry / MANIFEST).read_bytes()
        for name, file in self.check(signed, key).files.items():
            if (entry / name).stat().st_size != file.size_bytes:
                raise Rejected(f"expected {file.size_bytes} bytes of {name}, found another size")
            for piece, data in zip(_pieces(file), pieces_of(entry / name), strict=True):
                if hashlib.sha256(data).hexdigest() != piece.sha256:
                    raise Rejected(f"expected another SHA-256 of {name}: it is not what was built")
                with reached():
                    self._objects.put(_name(key, piece.sha256), bytes(data))
        with reached():
            try:
                self._objects.put(_name(key, MANIFEST), signed, if_absent=not replace)
            except ObjectExists:
                return False
        return True

    def lease(self, key: str, host: str) -> BuildLease:
        """Not taken yet. host: see there."""
        return BuildLease(self._objects, _name(key, LEASE), host, self._lease_s)

    def failure(self, key: str) -> Failure | None:
        data = self._read(key, FAILED, MANIFEST_LIMIT_BYTES)
        with suppress(*UNDECODABLE):
            return msgspec.json.decode(data, type=Failure) if data else None
        return None

    def remember(self, key: str, failure: Failure) -> None:
        with reached():
            self._objects.put(_name(key, FAILED), msgspec.json.encode(failure))

    def forget(self, key: str) -> None:
        with reached():
            self._objects.delete(_name(key, FAILED))

    def entries(self) -> list[StoreEntry]:
        """The least recently used first."""
        found: dict[str, dict[str, ObjectInfo]] = defaultdict(dict)
        with reached():
            for info in self._objects.list(FOLDER):
                with suppress(ValueError):  # not of the cache
                    _, _, key, name = info.key.split("/")
                    found[key][name] = info
        entries = [_entry(key, objects) for key, objects in found.items()]
        return sorted(entries, key=lambda entry: entry.used_at)

    def prune(
        self,
        *,
        max_bytes: int | None = None,
        unused_s: float | None = None,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> list[StoreEntry]:
        """Remove entries that nobody has fetched for so long, and the least recently used until the
        rest fits; also what builders left unfinished. Never one that is built or fetched just now.

        The age is what this machine's clock makes of the store's: where they differ by hours, too
        much or nothing is old. What is removed wrongly is built again.
        """
        now = clock()
        entries = self.entries()
        excess_bytes = (
            sum(e.size_bytes for e in entries) - max_bytes if max_bytes is not None else 0
        )
        pruned = []
        for entry in entries:
            idle_s = now - entry.used_at
            if idle_s < IN_USE_S:
                continue
            expired = unused_s is not None and idle_s >= unused_s
            if expired or excess_bytes > 0 or not entry.whole:
                if not dry_run:
                    self.remove(entry.key)
                excess_bytes -= entry.size_bytes
                pruned.append(entry)
        return pruned

    def verify(self, key: str) -> str | None:
        """What is wrong with the entry, which is read as a whole. With damaged files it is withdrawn: a
        builder that has the engine shares it again."""
        signed = self.manifest(key)
        try:
            if signed is None:
                raise Rejected("it has no manifest")
            manifest = self.check(signed, key)
            with self._withdrawn_if_damaged(key, signed):
                for file in manifest.files.values():
                    for piece in _pieces(file):
                        self._copy(key, piece, io.BytesIO())
        except Rejected as reason:
            return str(reason)
        return None

    def remove(self, key: str) -> None:
        """The manifest first: without it the entry is none."""
        with reached():
            self._objects.delete(_name(key, MANIFEST))
            for info in list(self._objects.list(_name(key))):
                self._objects.delete(info.key)

    @contextmanager
    def _withdrawn_if_damaged(self, key: str, signed: bytes) -> Iterator[None]:
        """Take this manifest away if a piece of it is damaged: the fleet would find it good for ever.

        One that is not believed stays, as it may only be this machine that lacks the key. One that took
        its place meanwhile stays too; but for the moment between the two requests, which costs another
        share. Who may only read the store can do nothing.
        """
        try:
            yield
        except Rejected as reason:
            try:
                if self.manifest(key) == signed:
                    with reached():
                        self._objects.delete(_name(key, MANIFEST))
                    _log.warning("engine_store_entry_withdrawn", key=key, reason=str(reason))
            except StoreUnavailable as error:
                _log.warning("engine_store_entry_not_withdrawn", key=key, reason=str(error))
            raise

    def _note_use(self, key: str) -> None:
        """Leave a trace for `prune`, of an engine that was found good: nobody waits for it. Who may only
        read the store leaves none."""

        def touch() -> None:
            time.sleep(AFTER_S)
            with suppress(StoreUnavailable), reached():
                self._objects.put(_name(key, USED), b"")

        threading.Thread(target=touch, name="engine-use", daemon=True).start()

    def _fetch(self, key: str, path: Path, piece: _Piece) -> None:
        with path.open("r+b") as file:
            file.seek(piece.offset)
            self._copy(key, piece, file)

    def _copy(self, key: str, piece: _Piece, file: BinaryIO) -> None:
        """Raises Rejected unless it is as the manifest says, and OSError. One that is not is read once more: the
        fault may be this machine's."""
        ref = Ref(_name(key, piece.sha256), piece.size_bytes, piece.sha256)
        start = file.tell()
        for last in (False, True):
            try:
                with reached():
                    self._objects.fetch_into(ref, file)
                break
            except InvalidJob as error:
                if last:
                    raise Rejected(error.message) from error
                file.seek(start)

    def _read(self, key: str, name: str, limit_bytes: int) -> bytes | None:
        with reached(), suppress(InvalidJob):
            return self._objects.get(_name(key, name), max_bytes=limit_bytes)
        return None


def _pieces(file: FileEntry) -> Iterator[_Piece]:
    for number, sha256 in enumerate(file.sha256):
        offset = number * PIECE_BYTES
        yield _Piece(offset, min(PIECE_BYTES, file.size_bytes - offset), sha256)


def _name(key: str, name: str = "") -> str:
    return f"{FOLDER}/{key[:2]}/{key}" + (f"/{name}" if name else "")


def _entry(key: str, objects: dict[str, ObjectInfo]) -> StoreEntry:
    return StoreEntry(
        key,
        sum(info.size_bytes for info in objects.values()),
        max(info.modified for info in objects.values()),
        whole=MANIFEST in objects,
        building=LEASE in objects,
    )
