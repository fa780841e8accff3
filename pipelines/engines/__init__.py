"""Engines: models compiled for this machine, kept in a cache, loaded, and run batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from infra.objects import ObjectStore
from infra.settings import Settings
from pipelines.engines.cache import Artefact, EngineCache
from pipelines.engines.digest import model_digest
from pipelines.engines.engine import Backend, DeviceOutOfMemory, Engine, Profile, TensorSpec
from pipelines.engines.flight import Build
from pipelines.engines.precision import PRECISIONS, Lowering
from pipelines.engines.signing import Keyring
from pipelines.engines.store import EngineStore
from schemas.errors import InvalidModel, Transient
from schemas.models import EngineConfig

__all__ = [
    "Artefact",
    "Backend",
    "DeviceOutOfMemory",
    "Engine",
    "EngineCache",
    "Profile",
    "TensorSpec",
    "build_engine",
    "load_engine",
    "open_cache",
]

_KEY_SCHEMA = 1
"""Raise it when artefacts of the same parts must not be used any longer."""


def open_cache(settings: Settings, objects: ObjectStore) -> EngineCache:
    """The cache of this machine; with keys to sign with, engines are shared through the object store
    too. Opens no connection. Raises PipelineError (settings_invalid)."""
    options = settings.engines
    keyring = Keyring(options.secrets())
    return EngineCache(
        options.cache_dir,
        options.cache_bytes,
        keyring=keyring,
        store=EngineStore(objects, keyring, lease_s=options.lease_s) if keyring else None,
        build_wait_s=options.build_wait_s,
        failure_memory_s=options.failure_memory_s,
    )


def load_engine(
    model: Path,
    config: EngineConfig,
    buckets: Sequence[int],
    *,
    cache: EngineCache,
    threads: int = 1,
    label: str = "",
    force: bool = False,
    may_build: bool = True,
    on_wait: Callable[[], None] | None = None,
) -> Engine:
    """Load a model's engine, compiled first if the cache has none for this model and this machine.

    buckets: batch sizes it will run, ascending. threads: that one run may use. label: names it for
    people. force: compile again what failed to a moment ago. may_build: False where builds must not
    run. on_wait: called when somebody else is compiling it.
    The engine belongs to the caller; its artefact is leased until it is closed.
    Raises InvalidModel, DeviceOutOfMemory, or Transient (see EngineCache.get_or_build).
    """
    backend = _backend(config.backend)
    key_parts, build = _recipe(backend, model, config, buckets, cache)
    artefact = cache.get_or_build(
        key_parts,
        build,
        label=label or model.name,
        force=force,
        may_build=may_build,
        on_wait=on_wait,
    )
    try:
        engine = backend.load(artefact.path, threads=threads)
    except BaseException:
        artefact.release()
        raise
    engine.after_close(artefact.release)
    return engine


def build_engine(
    model: Path,
    config: EngineConfig,
    buckets: Sequence[int],
    *,
    cache: EngineCache,
    target: str | None = None,
    label: str = "",
    force: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Artefact:
    """See that the cache has a model's engine, without loading it. target: a device other than this
    machine's, in the backend's words. The others, and what is raised: see load_engine.
    The caller releases the artefact."""
    backend = _backend(config.backend)
    if target is not None:
        backend = _for_target(backend, target)
    key_parts, build = _recipe(backend, model, config, buckets, cache)
    return cache.get_or_build(
        key_parts, build, label=label or model.name, force=force, on_wait=on_wait
    )


@runtime_checkable
class CrossBackend(Protocol):
    """A backend that compiles for devices other than this machine's."""

    def for_target(self, target: str) -> Backend:
        """The same for this device, which its fingerprint names. Raises InvalidModel."""


def _for_target(backend: Backend, target: str) -> Backend:
    if isinstance(backend, CrossBackend):
        return backend.for_target(target)
    raise InvalidModel(
        "engine_target_unsupported",
        f"Expected a backend that compiles for other devices, {backend.name} compiles for the machine"
        f" it runs on, not for {target!r}; build there, without a target.",
    )


def _recipe(
    backend: Backend, model: Path, config: EngineConfig, buckets: Sequence[int], cache: EngineCache
) -> tuple[dict[str, object], Build]:
    """All that the artefact depends on, and what makes it. Raises InvalidModel."""
    profile = Profile(tuple(buckets), config.shapes, config.precision)
    lowering = Lowering(model, config)
    notes = cache.root / "digests"
    digest = model_digest(model, notes)

    def build(into: Path) -> None:
        with lowering.graph() as graph:
            backend.compile(graph, profile, into)
        lowering.prove(backend, into)
        if model_digest(model, notes) != digest:
            raise Transient(
                "model_changed", f"Expected {model.name} to stay as it is; load it again."
            )

    key_parts: dict[str, object] = {
        "schema": _KEY_SCHEMA,
        "backend": [backend.name, backend.version],
        "model": digest,
        "precision": lowering.key(),
        "profile": msgspec.to_builtins(profile),
        "fingerprint": backend.fingerprint(),
    }
    return key_parts, build


@functools.cache
def _backend(name: str) -> Backend:
    """One of each per process. A backend's library is imported when a model first asks for it."""
    if name == "onnxruntime":
        from pipelines.engines.onnxruntime import OnnxRuntime

        return OnnxRuntime()
    if name == "onnxruntime-cuda":
        from pipelines.engines.onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda()
    if name == "openvino":
        from pipelines.engines.openvino import OpenVino

        return OpenVino()
    if name in ("tensorrt", "tensorrt-rtx"):
        from pipelines.engines.tensorrt import TensorRT

        return TensorRT(name)
    raise InvalidModel("unknown_backend", f"Expected {', '.join(PRECISIONS)}, got {name!r}.")
