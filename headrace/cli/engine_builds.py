"""What `headrace engines build` and `prewarm` do: see that models' engines are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from headrace.cli.jobs import progress_bar
from infra.catalogue import Catalogue
from pipelines.build import Wanted, engines_of, see_built
from pipelines.bundle import Bundle
from pipelines.engines import Engines
from pipelines.engines.build_log import shown
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
