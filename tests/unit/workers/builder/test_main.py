"""The builder process over a real cache and catalogue in the test's own folder."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings, load_settings
from pipelines import build, registry
from pipelines.build import Cached, Wanted
from pipelines.bundle import Bundle
from pipelines.engines import Engines, open_engines
from pipelines.engines.reach import StoreUnavailable
from pipelines.engines.store import EngineStore
from pipelines.load import load_model
from schemas.errors import Transient
from schemas.models import ModelCard
from workers.builder.builder import SHARE_EVERY_S, TROUBLE_S
from workers.builder.main import Process

BUDGET_BYTES = 1 << 30


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(data_dir=tmp_path, engines={"cache_dir": tmp_path / "engines"})


@pytest.fixture
def process(settings: Settings) -> Process:
    return Process(settings)


@pytest.fixture
def install(
    process: Process, make_tensor_bundle: Callable[..., Path], tmp_path: Path
) -> Callable[..., ModelCard]:
    """`install("tiny")`: from another machine, so that this one has no engine of it."""

    def add(name: str) -> ModelCard:
        there = load_settings(data_dir=tmp_path, engines={"cache_dir": tmp_path / "there"})
        engines = open_engines(there, process.objects)
        bundle = make_tensor_bundle(name)
        return registry.add(bundle, process.objects, engines, budget_bytes=BUDGET_BYTES).card

    return add


def load(settings: Settings, process: Process, card: ModelCard) -> None:
    """As a worker does."""
    bundle = Bundle.open(process.catalogue.folder(card))
    engines = open_engines(settings, process.objects)
    load_model(bundle, engines, budget_bytes=BUDGET_BYTES, may_build=False).close()


def test_what_it_has_built_a_worker_loads(
    process: Process, settings: Settings, install: Callable[..., ModelCard]
) -> None:
    card = install("tiny")
    with pytest.raises(Transient) as refused:
        load(settings, process, card)
    assert refused.value.code == "engine_not_built"

    process._step()

    load(settings, process, card)
    process._step()
    assert process.idle


@pytest.mark.parametrize("lost", [shutil.rmtree, lambda path: (path / "manifest.json").unlink()])
def test_an_engine_that_is_gone_or_damaged_is_built_again(
    process: Process, settings: Settings, install: Callable[..., ModelCard], lost: Any
) -> None:
    card = install("tiny")
    process._step()
    (entry,) = settings.engines.cache_dir.glob("objects/*/*")
    lost(entry)

    process._step()

    load(settings, process, card)


def test_to_look_whether_an_engine_is_there_is_no_use_of_it(
    process: Process, settings: Settings, install: Callable[..., ModelCard]
) -> None:
    """Or the least recently used ones would be those that workers use."""
    install("tiny")
    process._step()
    (entry,) = settings.engines.cache_dir.glob("objects/*/*")
    before = entry.stat().st_mtime_ns

    process._step()

    assert process.idle
    assert entry.stat().st_mtime_ns == before


def test_with_nothing_to_build_nothing_heavy_is_imported(process: Process) -> None:
    process._step()

    assert process.idle
    assert "engines" not in process.__dict__


def test_sigterm_is_obeyed_between_builds(
    process: Process, install: Callable[..., ModelCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        install(name)
    stop = threading.Event()
    see_built = process.engines.see_built
    built: list[str] = []

    def see_one(card: ModelCard) -> list[str]:
        assert process.health.ready
        stop.set()
        built.append(card.name)
        return see_built(card)

    monkeypatch.setattr(process.engines, "see_built", see_one)

    assert process.run(stop) == 0

    assert built == ["two"]
    assert not process.health.ready


@pytest.fixture
def sharing(
    tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Process, EngineStore]:
    """A builder with keys, on the clock of the test, and the store that it shares engines through."""
    keys = {"cache_dir": tmp_path / "engines", "keys": {"one": "k" * 32}}
    process = Process(load_settings(data_dir=tmp_path, engines=keys))
    monkeypatch.setattr(process.builder, "_monotonic", clock.monotonic)
    store = process.engines._engines.cache.store
    assert store is not None
    return process, store


def test_what_could_not_be_shared_when_it_was_built_is_shared_later(
    sharing: tuple[Process, EngineStore],
    install: Callable[..., ModelCard],
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the workers of other machines would wait for it until somebody starts the builder anew."""
    process, store = sharing
    publish = store.publish

    def away(*_: Any, **__: Any) -> bool:
        raise StoreUnavailable("engine_store_unavailable", "The store is told to be away.")

    install("tiny")
    monkeypatch.setattr(store, "publish", away)
    process._step()
    assert store.entries() == []

    monkeypatch.setattr(store, "publish", publish)
    clock.advance(TROUBLE_S)
    process._step()

    assert len(store.entries()) == 1


def test_what_the_store_has_lost_is_shared_again(
    sharing: tuple[Process, EngineStore], install: Callable[..., ModelCard], clock: Any
) -> None:
    """Pruned too early, or found damaged by a worker."""
    process, store = sharing
    install("tiny")
    process._step()
    (entry,) = store.entries()
    store.remove(entry.key)

    process._step()
    assert store.entries() == [], "it does not ask the store all the time"
    clock.advance(SHARE_EVERY_S)
    process._step()

    assert store.verify(entry.key) is None
    assert process.idle


def test_a_version_of_many_engines_does_not_look_stalled(
    process: Process,
    settings: Settings,
    install: Callable[..., ModelCard],
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each may be waited for, and then be built, for as long as anybody waits for a build."""
    install("tiny")
    monkeypatch.setattr(process.health, "_monotonic", clock.monotonic)
    lived: list[bool] = []

    def engines_of(bundle: Bundle) -> list[Wanted]:
        return build.engines_of(bundle) * 3

    def see_built(engine: Wanted, engines: Engines) -> Cached:
        clock.advance(2 * settings.engines.build_wait_s)
        lived.append(process.health.live)
        return build.see_built(engine, engines)

    monkeypatch.setattr("workers.builder.engines.engines_of", engines_of)
    monkeypatch.setattr("workers.builder.engines.see_built", see_built)
    process.health.progress()

    process._step()

    assert lived == [True] * 3


def test_a_store_that_is_away_is_waited_for(
    process: Process, install: Callable[..., ModelCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("tiny")
    stop = threading.Event()
    seen: list[str | None] = []
    cards = process.catalogue.cards

    def away() -> list[ModelCard]:
        monkeypatch.setattr(process.builder, "_cards", cards)
        raise Transient("storage_unavailable", "The store is told to be away.")

    def wait(_seconds: float) -> bool:
        seen.append(process.trouble)
        if len(seen) == 2:
            stop.set()
        return stop.is_set()

    monkeypatch.setattr(process.builder, "_cards", away)
    monkeypatch.setattr(stop, "wait", wait)

    assert process.run(stop) == 0

    assert seen == ["storage_unavailable", None]
