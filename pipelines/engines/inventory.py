"""What the engine cache holds, on this machine and in the object store, for people to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from pipelines.engines.cache import EngineCache
from pipelines.engines.failures import Failure
from pipelines.engines.manifest import MANIFEST, Manifest, Rejected, open_manifest
from pipelines.engines.reach import StoreUnavailable


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What lies under one key. where: on this machine's disk, in the fleet's store. leased: something
    on this machine has it loaded. used_at: seconds since the epoch. note: why it is rejected or failed.
    manifest: None where there is none, or none to be believed."""

    key: str
    state: Literal["ready", "rejected", "building", "failed", "unfinished"]
    where: tuple[Literal["disk", "store"], ...]
    label: str = ""
    size_bytes: int = 0
    used_at: float
    leased: bool = False
    note: str = ""
    log: str = ""
    manifest: Manifest | None = None

    @property
    def backend(self) -> str:
        """With its version."""
        parts = self.manifest.key_parts.get("backend") if self.manifest else None
        return " ".join(map(str, parts)) if isinstance(parts, list) else ""


class Inventory(Struct, frozen=True):
    """store_fault: why the object store could not be asked."""

    engines: list[EngineInfo]
    store_fault: str | None = None


def inventory(cache: EngineCache) -> Inventory:
    """The most recently used first. Reads every manifest, and no artefact. Raises OSError."""
    engines = {info.key: info for info in (*_failed(cache), *_on_disk(cache))}
    fault = None
    try:
        for info in _in_store(cache):
            known = engines.get(info.key)
            if known is None or known.state != "ready":
                engines[info.key] = info
            elif info.state == "ready":
                engines[info.key] = replace(known, where=("disk", "store"))
    except StoreUnavailable as error:
        fault = str(error)
    return Inventory(sorted(engines.values(), key=lambda info: -info.used_at), fault)


def _on_disk(cache: EngineCache) -> Iterator[EngineInfo]:
    for entry in cache.disk.entries():
        signed = b""
        with suppress(FileNotFoundError):  # or evicted meanwhile
            signed = (cache.disk.entry(entry.key) / MANIFEST).read_bytes()
        yield _judged(
            cache,
            signed,
            EngineInfo(
                key=entry.key,
                state="ready",
                where=("disk",),
                size_bytes=entry.size_bytes,
                used_at=entry.used_at,
                leased=cache.disk.is_leased(entry.key),
            ),
        )


def _in_store(cache: EngineCache) -> Iterator[EngineInfo]:
    if cache.store is None:
        return
    for entry in cache.store.entries():
        info = EngineInfo(
            key=entry.key,
            state="building" if entry.building else "unfinished",
            where=("store",),
            size_bytes=entry.size_bytes,
            used_at=entry.used_at,
        )
        if signed := cache.store.manifest(entry.key):
            yield _judged(cache, signed, replace(info, state="ready"))
        elif not entry.building and (failure := cache.store.failure(entry.key)):
            yield _failure(entry.key, failure, "store")
        else:
            yield info


def _judged(cache: EngineCache, signed: bytes, info: EngineInfo) -> EngineInfo:
    try:
        manifest = open_manifest(signed, info.key, cache.keyring)
    except Rejected as reason:
        return replace(info, state="rejected", note=str(reason))
    return replace(info, label=manifest.label, manifest=manifest, log=manifest.build.log)


def _failed(cache: EngineCache) -> Iterator[EngineInfo]:
    for key, failure in cache.disk.failures():
        yield _failure(key, failure, "disk")


def _failure(key: str, failure: Failure, where: Literal["disk", "store"]) -> EngineInfo:
    return EngineInfo(
        key=key,
        state="failed",
        where=(where,),
        label=failure.label,
        used_at=failure.at,
        note=f"{failure.code}: {failure.message}",
        log=failure.log,
    )
