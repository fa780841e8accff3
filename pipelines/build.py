"""See that the engines of a bundle are in the cache, without loading them. For builders and `headrace engines`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from pipelines.bundle import Bundle
from pipelines.engines import Engines
from pipelines.engines.order import Trace
from pipelines.engines.reach import StoreUnavailable
from schemas.models import EngineConfig


class Wanted(NamedTuple):
    """One engine of a bundle. label: for people."""

    bundle: Bundle
    config: EngineConfig
    label: str


class Cached(NamedTuple):
    """An engine that is in the cache. shared: it was copied to the object store now. store_fault: why the
    store could not be used."""

    trace: Trace
    shared: bool
    store_fault: str | None


def engines_of(bundle: Bundle, backend: str | None = None) -> list[Wanted]:
    """backend: instead of the one that model.yaml says."""
    name = f"{bundle.config.name}/{bundle.config.version}"
    return [
        Wanted(bundle, replace(config, backend=backend) if backend else config, f"{name} {role}")
        for role, config in bundle.config.engines.items()
    ]


def see_built(
    engine: Wanted,
    engines: Engines,
    *,
    target: str | None = None,
    rebuild: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Cached:
    """Fetch or compile the engine, unless this machine has it; and copy it to the store, if that has it not.

    The others, and what is raised: see Engines.obtain.
    """
    bundle = engine.bundle
    obtained = engines.obtain(
        bundle.path(engine.config.file),
        engine.config,
        bundle.config.batch.buckets,
        target=target,
        label=engine.label,
        rebuild=rebuild,
        on_wait=on_wait,
    )
    obtained.release()
    trace = obtained.artefact.trace
    shared, fault = trace.origin == "built" and engines.cache.store is not None, trace.store_fault
    if trace.origin == "local":
        try:
            shared = engines.cache.share(trace.key)
        except StoreUnavailable as error:
            fault = str(error)
    return Cached(trace, shared and fault is None, fault)
