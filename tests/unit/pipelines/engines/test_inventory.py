"""What the cache holds, as people are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.engines import inventory as inventory_module
from pipelines.engines.cache import EngineCache
from pipelines.engines.inventory import inventory
from schemas.errors import InvalidModel


def build(into: Path) -> None:
    (into / "engine.bin").write_bytes(b"compiled")


def fail(into: Path) -> None:
    raise InvalidModel("unusable_onnx", "Expected a model, got none.")


def test_what_is_ready_in_use_rejected_and_failed_is_told_apart(cache: EngineCache) -> None:
    held = cache.get_or_build({"model": "held"}, build, label="held/1 main")
    cache.get_or_build({"model": "bad"}, build).release()
    bad = cache.get_or_build({"model": "bad"}, build)
    (bad.path.parent / "manifest.json").write_bytes(b"{}")
    bad.release()
    with pytest.raises(InvalidModel):
        cache.get_or_build({"model": "failed"}, fail)

    found = {info.key: info for info in inventory(cache).engines}

    states = {info.state: info for info in found.values()}
    assert sorted(states) == ["failed", "ready", "rejected"]
    assert (found[held.trace.key].label, found[held.trace.key].leased) == ("held/1 main", True)
    assert "unreadable" in states["rejected"].note
    assert "Expected a model" in states["failed"].note


def test_an_engine_evicted_meanwhile_does_not_end_it(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get_or_build({"model": "a"}, build).release()
    cache.get_or_build({"model": "b"}, build).release()
    judged = inventory_module._judged

    def evict_the_rest(*args: object) -> object:
        cache.prune(0)
        return judged(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(inventory_module, "_judged", evict_the_rest)
    assert len(inventory(cache).engines) == 2
