"""Engines made ahead of their use, for this machine or others, and the cache that settings amount to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.objects.files import FileObjects
from infra.settings import load_settings
from pipelines.engines import Backend, EngineCache, Engines, Profile, open_engines
from pipelines.engines.backends import Backends
from pipelines.engines.manifest import check
from schemas.errors import InvalidModel, PipelineError, Transient
from schemas.models import EngineConfig

MakeModel = Callable[..., Path]
CONFIG = EngineConfig(file="model.onnx")


def test_what_was_built_ahead_is_loaded_where_builds_must_not_run(
    classifier: MakeModel, cache: EngineCache
) -> None:
    model = classifier()
    with pytest.raises(Transient, match="tiny/1 main") as refused:
        Engines(cache).obtain(model, CONFIG, (1, 8), may_build=False, label="tiny/1 main").load()
    assert refused.value.code == "engine_not_built"
    Engines(cache).obtain(model, CONFIG, (1, 8)).release()
    Engines(cache).obtain(model, CONFIG, (1, 8), may_build=False).load().close()


def test_an_engine_that_is_there_is_compiled_anew_where_that_is_asked_for(
    classifier: MakeModel, cache: EngineCache
) -> None:
    origins = []
    for rebuild in (False, True, False):
        artefact = Engines(cache).obtain(classifier(), CONFIG, (1,), rebuild=rebuild).artefact
        origins.append(artefact.trace.origin)
        artefact.release()
    assert origins == ["built", "built", "local"]


def test_an_engine_says_which_model_it_was_built_for(
    classifier: MakeModel, cache: EngineCache
) -> None:
    artefact = Engines(cache).obtain(classifier(), CONFIG, (1,), label="tiny/1 main").artefact
    entry = artefact.path.parent
    assert check(entry, entry.name, cache.keyring).label == "tiny/1 main"


class ForAnyDevice:
    """Compiles for any device, by writing down which."""

    name, version = "fake", "1"

    def __init__(self, device: str = "here") -> None:
        self._device = device

    def for_target(self, target: str) -> Backend:
        return ForAnyDevice(target)  # type: ignore[return-value]

    def fingerprint(self) -> dict[str, object]:
        return {"device": self._device}

    def compile(self, model: Path, profile: Profile, into: Path, *rest: object) -> None:
        (into / "engine.bin").write_text(self._device)


def test_an_engine_for_another_device_is_another_engine(
    classifier: MakeModel, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier()
    monkeypatch.setattr(Backends, "_make", lambda self, name: ForAnyDevice())
    artefacts = [
        Engines(cache).obtain(model, CONFIG, (1,), target=target).artefact
        for target in (None, "sm89", "sm120", "sm89")
    ]
    written = [(artefact.path / "engine.bin").read_text() for artefact in artefacts]
    assert written == ["here", "sm89", "sm120", "sm89"]
    assert artefacts[1].path == artefacts[3].path


def test_a_new_version_of_a_backend_is_built_for_beside_the_one_in_use(
    classifier: MakeModel, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a rollout finds its engines ready, and a rollback its own."""
    model = classifier()
    monkeypatch.setattr(Backends, "_make", lambda self, name: ForAnyDevice())
    old = Engines(cache).obtain(model, CONFIG, (1,)).artefact
    monkeypatch.setattr(ForAnyDevice, "version", "2")
    new = Engines(cache).obtain(model, CONFIG, (1,)).artefact
    monkeypatch.setattr(ForAnyDevice, "version", "1")
    again = Engines(cache).obtain(model, CONFIG, (1,)).artefact
    assert [one.trace.origin for one in (old, new, again)] == ["built", "built", "local"]
    assert old.path == again.path != new.path


def test_a_backend_that_knows_this_machine_alone_refuses_others(
    classifier: MakeModel, cache: EngineCache
) -> None:
    with pytest.raises(InvalidModel, match="onnxruntime compiles for the machine") as refused:
        Engines(cache).obtain(classifier(), CONFIG, (1,), target="sm89")
    assert refused.value.code == "engine_target_unsupported"


@pytest.fixture
def cache_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineCache]:
    """`cache_of(KEYS="{}")`: as a process would open it, in folders of its own."""

    def open_(**environment: str) -> EngineCache:
        monkeypatch.setenv("HEADRACE_ENGINES__CACHE_DIR", str(tmp_path / "engines"))
        for name, value in environment.items():
            monkeypatch.setenv(f"HEADRACE_ENGINES__{name}", value)
        return open_engines(
            load_settings(data_dir=tmp_path), FileObjects(tmp_path / "objects")
        ).cache

    return open_


@pytest.mark.parametrize("environment", [{}, {"KEYS": "{}"}])
def test_without_keys_engines_stay_on_this_machine(
    cache_of: Callable[..., EngineCache], tmp_path: Path, environment: dict[str, str]
) -> None:
    """A compose file passes on {} where nobody has set any."""
    cache = cache_of(**environment)
    assert cache.store is None
    cache.get_or_build({"model": "a"}, lambda into: None).release()
    assert not (tmp_path / "objects" / "engines").exists()


def test_with_keys_they_are_shared(cache_of: Callable[..., EngineCache], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"old": "o" * 32}))
    cache = cache_of(KEYS=json.dumps({"new": "n" * 32}), KEYS_FILE=str(file))
    assert cache.store is not None
    assert cache.keyring.sign(b"").key_id == "new"
    signed_before = cache_of(KEYS="{}", KEYS_FILE=str(file)).keyring.sign(b"content")
    assert cache.keyring.fault(b"content", signed_before) is None


@pytest.mark.parametrize("content", [None, "no JSON", '{"k1": "short"}', '{"": "%s"}' % ("s" * 32)])
def test_a_wrong_file_of_keys_is_named_and_not_shown(
    cache_of: Callable[..., EngineCache], tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PipelineError, match="HEADRACE_ENGINES__KEYS_FILE") as refused:
        cache_of(KEYS_FILE=str(file))
    assert refused.value.code == "settings_invalid"
    assert "short" not in refused.value.message
    assert "sss" not in refused.value.message
