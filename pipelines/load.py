"""From a bundle to a model that answers: engines out of the cache, steps made. For workers and for `models add`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from pipelines.bundle import Bundle
from pipelines.engines import Engines, Obtained
from pipelines.engines.engine import Engine, OnStep, unheard
from pipelines.model import LoadedModel
from schemas.errors import InvalidModel


def load_model(
    bundle: Bundle,
    engines: Engines,
    *,
    budget_bytes: int,
    force: bool = False,
    may_build: bool = True,
    make_room: Callable[[], None] = lambda: None,
    on_step: OnStep = unheard,
) -> LoadedModel:
    """Load every engine of a bundle, compiled first where the cache has none. The caller closes the model.

    budget_bytes: most engine memory it may take. force: compile again what failed to a moment ago.
    may_build: if not, an engine that the cache has not is Transient("engine_not_built").
    make_room: called when all its engines are at hand, before any is loaded.
    on_step: those of Engines.obtain and `load` after the engine's role, then `prepare`.
    Raises InvalidModel, DeviceOutOfMemory, and Transient from the cache; then nothing stays loaded.
    """
    with ExitStack() as loaded:
        obtained: dict[str, Obtained] = {}
        for role, config in bundle.config.engines.items():
            obtained[role] = engines.obtain(
                bundle.path(config.file),
                config,
                bundle.config.batch.buckets,
                label=f"{bundle.config.name}/{bundle.config.version} {role}",
                force=force,
                may_build=may_build,
                on_step=_of(role, on_step),
            )
            loaded.callback(obtained[role].release)
        make_room()
        by_role: dict[str, Engine] = {}
        for role, one in obtained.items():
            by_role[role] = one.load()
            loaded.callback(by_role[role].close)
            on_step(f"{role} load")
        _check_memory(bundle, by_role, budget_bytes)
        model = LoadedModel(bundle, by_role)
        on_step("prepare")
        loaded.pop_all()
    return model


def _of(role: str, on_step: OnStep) -> OnStep:
    return lambda step: on_step(f"{role} {step}")


def _check_memory(bundle: Bundle, engines: dict[str, Engine], budget_bytes: int) -> None:
    needed_bytes = sum(engine.memory_bytes for engine in engines.values())
    if needed_bytes > budget_bytes:
        raise InvalidModel(
            "model_too_large",
            f"{bundle.config.name}: expected engines of at most {budget_bytes} bytes, which is what a"
            f" worker may hold (HEADRACE_WORKER__MEMORY_BYTES), came {needed_bytes}; raise it or use a"
            " smaller model.",
        )
