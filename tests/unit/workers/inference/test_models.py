"""What a worker loads: at its start, for a job, and beside the jobs when there is something newer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.settings import Settings
from pipelines.bundle import Bundle
from pipelines.engines import EngineCache, Engines
from pipelines.load import load_model
from schemas.errors import DEVICE_FAILED, InvalidJob, InvalidModel, PipelineError, Transient
from workers.inference import models as models_module
from workers.inference import start as start_module
from workers.inference.models import Models
from workers.inference.start import Steps

LOAD_STEPS = (
    "fetch", "main backend", "main artefact (local)", "main load", "prepare", "warm 1", "warm 4",
)  # fmt: skip


def make_card(name: str, version: int, tier: str) -> Any:
    return SimpleNamespace(name=name, version=version, tier=tier, memory_bytes=1, size_bytes=1)


class FakeCatalogue:
    """newest: version by name; a name that is not in it is unknown. folders: of bundles, by name."""

    def __init__(self, newest: dict[str, int]) -> None:
        self.newest = newest
        self.folders: dict[str, Path] = {}
        self.tiers: dict[str, str] = {}

    def cards(self) -> list[Any]:
        return [self.resolve(name, None) for name in self.newest]

    def resolve(self, name: str, version: int | None) -> Any:
        if name not in self.newest:
            raise InvalidJob("model_unknown", "It is gone.")
        return make_card(name, version or self.newest[name], self.tiers.get(name, "standard"))

    def folder(self, card: Any) -> Path:
        return self.folders[card.name]


@pytest.fixture
def catalogue() -> FakeCatalogue:
    return FakeCatalogue({})


@pytest.fixture
def failed_devices() -> list[bool]:
    return []


@pytest.fixture
def models(tmp_path: Path, catalogue: Any, failed_devices: list[bool]) -> Models:
    options = Settings(data_dir=tmp_path, worker={"name": "w"}).worker
    engines = Engines(EngineCache(tmp_path / "cache", 1 << 30))
    return Models(options, catalogue, engines, lambda: failed_devices.append(True))


@pytest.fixture
def loads(models: Models, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Loads go through a function of the test, which raises where one is to fail."""

    def replace(check: Callable[..., None]) -> None:
        def load(card: Any, make_room: Callable[[], None]) -> Any:
            check(card.name, card.version)
            make_room()
            return SimpleNamespace(memory_bytes=1, close=lambda: None)

        monkeypatch.setattr(models, "_load", load)

    return replace


@pytest.fixture
def installed(
    models: Models, catalogue: FakeCatalogue, make_tensor_bundle: Callable[..., Path]
) -> str:
    """The name of a model that is in the catalogue, its engine compiled when it was added."""
    folder = make_tensor_bundle("tiny", more="batch: {max_jobs: 4, buckets: [1, 4]}")
    load_model(Bundle.open(folder), models._engines, budget_bytes=2**30).close()
    catalogue.newest["tiny"] = 1
    catalogue.folders["tiny"] = folder
    return "tiny"


def hold(models: Models, name: str) -> None:
    with models.resident.use(name, 1):
        pass


def test_a_start_has_the_steps_of_every_model(models: Models, installed: str) -> None:
    start = Steps()

    models.warm_up(start)

    assert list(start.seconds) == [
        "catalogue", *(f"{installed}/1 {step}" for step in LOAD_STEPS),
    ]  # fmt: skip
    assert models.resident.names() == ["tiny/1"]


def test_a_model_that_is_loaded_later_is_no_part_of_the_start_and_told_in_one_line(
    models: Models, catalogue: FakeCatalogue, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, catalogue.newest = catalogue.newest, {}
    start = Steps()
    models.warm_up(start)
    catalogue.newest = newest
    logged: list[Any] = []
    log = SimpleNamespace(
        info=lambda event, **facts: logged.append((event, facts)), debug=lambda *_, **__: None
    )
    for module in (models_module, start_module):
        monkeypatch.setattr(module, "logger", log)

    hold(models, installed)

    assert list(start.seconds) == ["catalogue"]
    ((event, facts),) = logged
    assert event == "model_loaded"
    assert [step for step, _ in facts["steps"]] == list(LOAD_STEPS)


def test_a_model_that_does_not_warm_up_is_closed_again(
    models: Models, catalogue: FakeCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines would stay in memory, uncounted, and more with each batch that asks for it."""
    closed: list[bool] = []

    def warm(_: Any) -> None:
        raise InvalidModel("model_check_failed", "No.")

    model = SimpleNamespace(warm=warm, close=lambda: closed.append(True), memory_bytes=1)
    catalogue.newest["echo"] = 1
    catalogue.folders["echo"] = Path()
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: None)
    monkeypatch.setattr(models_module, "load_model", lambda *_, **__: model)

    with pytest.raises(InvalidModel):
        hold(models, "echo")

    assert closed == [True]


def test_a_model_that_does_not_load_keeps_no_other_from_being_warmed_up(
    models: Models, catalogue: FakeCatalogue, loads: Any
) -> None:
    def check(name: str, version: int) -> None:
        if name == "bad":
            raise Transient("storage_unavailable", "away")

    loads(check)
    catalogue.newest = {"bad": 1, "good": 1}
    start = Steps()

    models.warm_up(start)

    assert models.resident.names() == ["good/1"]
    assert list(start.seconds) == ["catalogue", "bad not loaded"]


def test_premium_models_are_warmed_up_first_and_no_more_than_there_is_room_for(
    models: Models, catalogue: FakeCatalogue, loads: Any
) -> None:
    loads(lambda name, version: None)
    catalogue.newest = {"a": 1, "b": 1, "paid": 1}
    catalogue.tiers["paid"] = "premium"
    models.resident._budget_bytes = 2
    models.resident._monotonic = iter(range(1000)).__next__  # each load takes its time

    start = Steps()
    models.warm_up(start)

    assert models.resident.names() == ["paid/1", "a/1"]
    assert "b not loaded" not in start.seconds


def test_a_model_whose_load_took_the_process_down_is_left_to_the_jobs_that_want_it(
    models: Models, catalogue: FakeCatalogue, loads: Any
) -> None:
    """Or no worker would ever get ready for the others."""
    loads(lambda name, version: None)
    catalogue.newest = {"bad": 1, "good": 1}
    models._unloadable = {"bad/1"}

    models.warm_up(Steps())
    models.keep_current()
    assert models.resident.names() == ["good/1"]

    hold(models, "bad")
    assert models.resident.names() == ["good/1", "bad/1"]


def test_a_load_is_marked_while_it_goes_on(
    models: Models, catalogue: FakeCatalogue, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = models._engines.cache.root / "loads"
    seen: list[list[str]] = []
    load = models_module.load_model

    def look(*args: Any, **options: Any) -> Any:
        seen.append([path.name for path in marks.iterdir()])
        return load(*args, **options)

    monkeypatch.setattr(models_module, "load_model", look)
    hold(models, installed)

    assert seen == [["tiny@1"]]
    assert list(marks.iterdir()) == []


@pytest.mark.parametrize(
    "failure", [ValueError("A bug in a step."), PipelineError("storage_access", "Denied.")]
)
def test_whatever_is_wrong_with_a_model_others_are_loaded_and_kept_current(
    models: Models, catalogue: FakeCatalogue, loads: Any, failure: Exception
) -> None:
    def check(name: str, version: int) -> None:
        if name == "bad":
            raise failure

    loads(check)
    catalogue.newest = {"bad": 1, "good": 1}
    models.warm_up(Steps())
    catalogue.newest = {"bad": 2, "good": 2}

    models.keep_current()

    assert models.resident.names() == ["good/1", "good/2"]


def test_a_store_that_refuses_once_does_not_end_the_looking(
    models: Models, catalogue: FakeCatalogue, loads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, version: int | None) -> Any:
        raise PipelineError("storage_access", "Denied.")

    loads(lambda name, version: None)
    catalogue.newest = {"good": 1}
    hold(models, "good")
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "resolve", refuse)
        models.keep_current()
    catalogue.newest = {"good": 2}

    models.keep_current()

    assert models.resident.names() == ["good/1", "good/2"]


def test_a_device_that_fails_while_warming_up_ends_the_start(
    models: Models, catalogue: FakeCatalogue, loads: Any
) -> None:
    def check(name: str, version: int) -> None:
        raise Transient(DEVICE_FAILED, "Expected CUDA's cuInit to succeed.")

    loads(check)
    catalogue.newest["echo"] = 1

    with pytest.raises(Transient, match="cuInit"):
        models.warm_up(Steps())


def test_a_device_that_fails_under_a_newer_version_is_told(
    models: Models, catalogue: FakeCatalogue, loads: Any, failed_devices: list[bool]
) -> None:
    """Or the next batch would be charged for it."""

    def check(name: str, version: int) -> None:
        if version == 2:
            raise Transient(DEVICE_FAILED, "Expected CUDA's cuMemAlloc to succeed.")

    loads(check)
    catalogue.newest["echo"] = 2
    hold(models, "echo")

    models.keep_current()

    assert failed_devices == [True]


def test_what_could_not_be_loaded_at_the_start_is_loaded_as_soon_as_it_can_be(
    models: Models, catalogue: FakeCatalogue, loads: Any
) -> None:
    """Its engine may just be being built."""
    built: set[str] = set()

    def check(name: str, version: int) -> None:
        if name not in built:
            raise Transient("engine_not_built", "Nobody has built it yet.")

    loads(check)
    catalogue.newest["echo"] = 1
    models.warm_up(Steps())

    models.keep_current()
    assert models.resident.names() == []
    built.add("echo")
    models.keep_current()

    assert models.resident.names() == ["echo/1"]
    assert models._not_loaded == set()  # or what had to make room would come back at once


def test_a_newer_version_is_loaded_beside_the_one_in_use_before_jobs_want_it(
    models: Models, catalogue: FakeCatalogue, loads: Any
) -> None:
    tried: list[str] = []

    def check(name: str, version: int) -> None:
        tried.append(f"{name}/{version}")
        if tried[-1] == "broken/2":
            raise InvalidModel("model_check_failed", "It does not answer.")

    loads(check)
    catalogue.newest = {"steady": 1, "new": 2, "broken": 2, "removed": 1}
    for name in ("broken", "new", "removed", "steady"):
        hold(models, name)
    del catalogue.newest["removed"]
    tried.clear()

    for _ in range(2):
        models.keep_current()

    assert tried == ["broken/2", "new/2"]
    assert set(models.resident.names()) == {
        "broken/1", "new/1", "new/2", "removed/1", "steady/1",
    }  # fmt: skip
