"""What `headrace engines build` and `prewarm` do: see that models' engines are in the cache, and that they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from msgspec import Struct

from headrace.cli.jobs import progress_bar
from infra.catalogue import Catalogue
from pipelines.build import Wanted, engines_of, see_built
from pipelines.bundle import Bundle
from pipelines.engines import Engines
from pipelines.engines.build_log import shown
from pipelines.load import load_model
from schemas.errors import InvalidJob, PipelineError


class Built(Struct, frozen=True, kw_only=True):
    """What became of one engine. origin: local, store or built. shared: it was copied to the object
    store now. error: why there is none."""

    engine: str
    key: str = ""
    origin: str = ""
    shared: bool = False
    wait_s: float = 0.0
    fetch_s: float = 0.0
    build_s: float = 0.0
    publish_s: float = 0.0
    store_fault: str | None = None
    error: str | None = None


class Warmed(Struct, frozen=True, kw_only=True):
    """A model that was loaded and run once for each bucket. error: why it could not be."""

    model: str
    warm_s: float = 0.0
    error: str | None = None


def wanted(models: Iterable[str], catalogue: Catalogue, backend: str | None) -> list[Wanted]:
    """The engines of models that are named by a folder, or as `name` or `name/version` in the catalogue.
    backend: instead of the one that model.yaml says. Raises InvalidJob, InvalidModel and Transient."""
    return [engine for model in models for engine in engines_of(_bundle(model, catalogue), backend)]


def build_all(
    wanted: list[Wanted], engines: Engines, *, target: str | None = None, force: bool = False
) -> Iterator[Built]:
    """One after the other, with a bar and the builders' log on stderr. An engine that cannot be built
    does not keep the others from it. force: compile also what is there."""
    with (
        progress_bar() as bar,
        shown(lambda line: bar.console.print(line, markup=False, style="dim")),
    ):
        task = bar.add_task("", total=len(wanted))
        for engine in wanted:
            bar.update(task, description=f"{engine.label}: build")
            on_wait = _waiting(lambda text: bar.update(task, description=text), engine.label)
            yield _build(engine, engines, target, force, on_wait)
            bar.advance(task)


def warm_all(wanted: list[Wanted], engines: Engines, budget_bytes: int) -> Iterator[Warmed]:
    """Each model once, as a worker on this machine would, whose engines are all there: what is compiled for its
    driver when an engine first runs is kept then too. budget_bytes: what a worker may hold in engines."""
    bundles = {one.bundle.digest: one.bundle for one in wanted}
    with progress_bar() as bar:
        task = bar.add_task("", total=len(bundles))
        for bundle in bundles.values():
            name = f"{bundle.config.name}/{bundle.config.version}"
            bar.update(task, description=f"{name}: warm up")
            yield _warm(name, bundle, engines, budget_bytes)
            bar.advance(task)


def _warm(name: str, bundle: Bundle, engines: Engines, budget_bytes: int) -> Warmed:
    began = time.monotonic()
    try:
        model = load_model(bundle, engines, budget_bytes=budget_bytes, may_build=False)
        with closing(model):
            model.warm()
    except PipelineError as error:
        return Warmed(model=name, error=f"{error.code}: {error.message}")
    except Exception as error:  # a bug in a step of one model is no reason to leave out the others
        return Warmed(model=name, error=f"{type(error).__name__}: {error}")
    return Warmed(model=name, warm_s=round(time.monotonic() - began, 6))


def _build(
    engine: Wanted,
    engines: Engines,
    target: str | None,
    force: bool,
    on_wait: Callable[[], None],
) -> Built:
    try:
        cached = see_built(engine, engines, target=target, rebuild=force, on_wait=on_wait)
    except PipelineError as error:
        return Built(engine=engine.label, error=f"{error.code}: {error.message}")
    trace = cached.trace
    return Built(
        engine=engine.label,
        key=trace.key,
        origin=trace.origin,
        shared=cached.shared,
        wait_s=trace.wait_s,
        fetch_s=trace.fetch_s,
        build_s=trace.build_s,
        publish_s=trace.publish_s,
        store_fault=cached.store_fault,
    )


def _waiting(describe: Callable[[str], None], label: str) -> Callable[[], None]:
    return lambda: describe(f"{label}: wait for somebody else who is building it")


def _bundle(model: str, catalogue: Catalogue) -> Bundle:
    if Path(model).is_dir():
        return Bundle.open(Path(model))
    name, _, version = model.partition("/")
    if version and not version.isdigit():
        raise InvalidJob(
            "model_unknown",
            f"Expected a folder with a model.yaml, or a model as NAME or NAME/VERSION, got {model!r}.",
        )
    card = catalogue.resolve(name, int(version) if version else None)
    return Bundle.open(catalogue.folder(card), check_graphs=False)
