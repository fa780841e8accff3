"""Engines: models compiled for this machine, kept in a cache, loaded, and run batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pipelines.engines.backends import Backends
from pipelines.engines.cache import Artefact, EngineCache
from pipelines.engines.digest import model_digest
from pipelines.engines.engine import (
    Backend,
    DeviceOutOfMemory,
    Engine,
    OnStep,
    Profile,
    TensorSpec,
    unheard,
)
from pipelines.engines.order import Build
from pipelines.engines.precision import Lowering
from pipelines.engines.signing import Keyring
from schemas.errors import PipelineError, Transient
from schemas.models import EngineConfig

if TYPE_CHECKING:
    from infra.objects import ObjectStore
    from infra.settings import Settings

__all__ = [
    "Artefact",
    "Backend",
    "DeviceOutOfMemory",
    "Engine",
    "EngineCache",
    "Engines",
    "Obtained",
    "Profile",
    "TensorSpec",
    "open_engines",
]

_KEY_SCHEMA = 1
"""Raise it when artefacts of the same parts must not be used any longer."""


class Obtained(NamedTuple):
    """An engine at hand, not loaded yet. Its artefact is leased until it is released, or the engine closed."""

    backend: Backend
    artefact: Artefact

    def load(self, *, threads: int = 1) -> Engine:
        """threads: that one run may use. The engine belongs to the caller. Raises InvalidModel,
        DeviceOutOfMemory, and Transient (engine_replaced) if it was compiled anew meanwhile: files of both may
        have been read. Then it is released."""
        try:
            engine = self.backend.load(self.artefact.path, threads=threads)
        except BaseException as error:
            replaced = self._is_replaced()
            self.release()
            if replaced and isinstance(error, PipelineError):
                raise _replaced() from error
            raise
        engine.after_close(self.release)
        if self._is_replaced():
            engine.close()
            raise _replaced()
        return engine

    def release(self) -> None:
        """Idempotent."""
        self.artefact.release()

    def _is_replaced(self) -> bool:
        return not self.artefact.lease.is_of(self.artefact.path.parent)


def _replaced() -> Transient:
    return Transient(
        "engine_replaced",
        "Expected the engine to stay as it was while it was loaded, somebody compiled it anew; load it again.",
    )


class Engines:
    """The engines of models on this machine. backends: those that no settings speak of, if left out."""

    def __init__(self, cache: EngineCache, backends: Backends | None = None) -> None:
        self.cache = cache
        self._backends = backends or Backends()

    def obtain(
        self,
        model: Path,
        config: EngineConfig,
        buckets: Sequence[int],
        *,
        target: str | None = None,
        label: str = "",
        force: bool = False,
        rebuild: bool = False,
        may_build: bool = True,
        on_wait: Callable[[], None] | None = None,
        on_step: OnStep = unheard,
    ) -> Obtained:
        """Have a model's engine at hand, compiled first if the cache has none for this model and this machine.

        buckets: batch sizes it will run, ascending. target: a device other than this machine's, in the
        backend's words. label: names it for people. force: compile again what failed to a moment ago.
        rebuild: compile it anew, and replace what is there, here and in the store. may_build: False where
        builds must not run. on_wait: called when somebody else is compiling it. on_step: the steps are the
        backend's library imported, and the artefact at hand and verified, with its origin (see Trace).
        Raises InvalidModel, DeviceOutOfMemory, or Transient (see EngineCache.get_or_build).
        """
        backend = self._backends.get(config.backend, target)
        on_step("backend")
        key_parts, build = self._recipe(backend, model, config, buckets)
        artefact = self.cache.get_or_build(
            key_parts,
            build,
            label=label or model.name,
            force=force,
            rebuild=rebuild,
            may_build=may_build,
            on_wait=on_wait,
        )
        on_step(f"artefact ({artefact.trace.origin})")
        return Obtained(backend, artefact)

    def _recipe(
        self, backend: Backend, model: Path, config: EngineConfig, buckets: Sequence[int]
    ) -> tuple[dict[str, object], Build]:
        """All that the artefact depends on, and what makes it. Raises InvalidModel."""
        profile = Profile(tuple(buckets), config.shapes, config.precision)
        lowering = Lowering(model, config)
        notes = self.cache.root / "digests"
        digest = model_digest(model, notes)

        def build(into: Path) -> None:
            with lowering.graph(into.parent) as graph:
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


def open_engines(settings: Settings, objects: ObjectStore) -> Engines:
    """Those of this machine, by the settings; with keys to sign with, they are shared through the object
    store too. Opens no connection. Raises PipelineError (settings_invalid)."""
    from pipelines.engines.machine_cache import MachineCache
    from pipelines.engines.store import EngineStore

    options = settings.engines
    keyring = Keyring(options.secrets())
    cache = EngineCache(
        options.cache_dir,
        options.cache_bytes,
        keyring=keyring,
        store=EngineStore(objects, keyring, lease_s=options.lease_s) if keyring else None,
        build_wait_s=options.build_wait_s,
        failure_memory_s=options.failure_memory_s,
    )
    return Engines(cache, Backends(options.tensorrt, MachineCache(cache.root / "machine", keyring)))
