"""Engines: models compiled for this machine, kept in a cache, loaded, and run batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from pipelines.engines.cache import EngineCache
from pipelines.engines.digest import model_digest
from pipelines.engines.engine import Backend, DeviceOutOfMemory, Engine, Profile, TensorSpec
from schemas.errors import InvalidModel, Transient
from schemas.models import EngineConfig

__all__ = [
    "Backend",
    "DeviceOutOfMemory",
    "Engine",
    "EngineCache",
    "Profile",
    "TensorSpec",
    "load_engine",
]

_KEY_SCHEMA = 1
"""Raise it when artefacts of the same parts must not be used any longer."""


def load_engine(
    model: Path,
    config: EngineConfig,
    buckets: Sequence[int],
    *,
    cache: EngineCache,
    threads: int = 1,
    force: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Engine:
    """Load a model's engine, compiled first if the cache has none for this model and this machine.

    buckets: batch sizes it will run, ascending. threads: that one run may use. force: compile again
    what failed to a moment ago. on_wait: called once if another process is compiling it.
    The engine belongs to the caller; its artefact is leased until it is closed.
    Raises InvalidModel, DeviceOutOfMemory, or Transient (see EngineCache.get_or_build).
    """
    backend = _backend(config.backend)
    profile = Profile(buckets=tuple(buckets))
    notes = cache.root / "digests"
    digest = model_digest(model, notes)

    def build(into: Path) -> None:
        backend.compile(model, profile, into)
        if model_digest(model, notes) != digest:
            raise Transient(
                "model_changed", f"Expected {model.name} to stay as it is; load it again."
            )

    key_parts: dict[str, object] = {
        "schema": _KEY_SCHEMA,
        "backend": [backend.name, backend.version],
        "model": digest,
        "precision": config.precision,
        "profile": msgspec.to_builtins(profile),
        "fingerprint": backend.fingerprint(),
    }
    artefact = cache.get_or_build(key_parts, build, force=force, on_wait=on_wait)
    try:
        engine = backend.load(artefact.path, threads=threads)
    except BaseException:
        artefact.release()
        raise
    engine.after_close(artefact.release)
    return engine


@functools.cache
def _backend(name: str) -> Backend:
    """One of each per process. A backend's library is imported when a model first asks for it."""
    if name == "onnxruntime":
        from pipelines.engines.onnxruntime import OnnxRuntime

        return OnnxRuntime()
    raise InvalidModel("unknown_backend", f"Expected the backend onnxruntime, got {name!r}.")
