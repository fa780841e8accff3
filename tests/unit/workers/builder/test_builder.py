"""Which version the builder sees to, and when again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from schemas.errors import InvalidModel, PipelineError, Transient
from schemas.models import ModelCard
from workers.builder.builder import SHARE_EVERY_S, TROUBLE_S, Builder

AGAIN_S = 300.0


class FakeCache:
    """Builds at once, unless it is told of an error; a build takes a second."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.tried: list[str] = []
        self.here: set[str] = set()
        self.asked_to_share: list[str] = []
        self.errors: dict[str, Exception] = {}

    def see_built(self, card: ModelCard) -> list[str]:
        model = f"{card.name}/{card.version}"
        self.tried.append(model)
        self.clock.advance(1.0)
        if model in self.errors:
            raise self.errors[model]
        keys = [f"{model} encoder", f"{model} decoder"]
        self.here |= set(keys)
        return keys

    def holds(self, key: str) -> bool:
        return key in self.here

    def share(self, key: str) -> None:
        self.asked_to_share.append(key)
        if key in self.errors:
            raise self.errors[key]


@pytest.fixture
def cache(clock: Any) -> FakeCache:
    return FakeCache(clock)


@pytest.fixture
def installed(make_card: Callable[..., ModelCard]) -> list[ModelCard]:
    """Of three models; the one in the middle came last."""
    return [make_card(name="a", added_at=1.0), make_card(name="b", added_at=3.0),
            make_card(name="c", added_at=2.0)]  # fmt: skip


@pytest.fixture
def builder(cache: FakeCache, installed: list[ModelCard], clock: Any) -> Builder:
    return build_for(lambda: installed, cache, clock)


def build_for(
    cards: Callable[[], list[ModelCard]], cache: FakeCache, clock: Any, again_s: float = AGAIN_S
) -> Builder:
    return Builder(cards, cache.see_built, cache.holds, cache.share, again_s, clock.monotonic)


def until_idle(builder: Builder) -> None:
    for _ in range(10):
        if not builder.step():
            return
    raise AssertionError("it never comes to rest")


def test_the_newest_goes_first_one_a_step_and_what_is_there_is_left_alone(
    builder: Builder, cache: FakeCache, clock: Any
) -> None:
    assert builder.step()
    assert cache.tried == ["b/1"]

    until_idle(builder)
    clock.advance(10 * AGAIN_S)
    until_idle(builder)

    assert cache.tried == ["b/1", "c/1", "a/1"]


def test_a_version_that_was_added_meanwhile_overtakes_those_that_wait(
    builder: Builder, cache: FakeCache, installed: list[ModelCard], make_card: Any
) -> None:
    builder.step()
    installed.append(make_card(name="a", version=2, added_at=4.0))

    builder.step()

    assert cache.tried == ["b/1", "a/2"]


@pytest.mark.parametrize(
    ("error", "pause_s"),
    [
        (InvalidModel("unsupported_operator", "No such operator."), AGAIN_S),
        (PipelineError("device_missing", "No GPU here."), AGAIN_S),
        (ZeroDivisionError("in a library"), AGAIN_S),
        (Transient("disk_full", "No room."), TROUBLE_S),
    ],
)
def test_one_that_fails_keeps_no_other_from_it_and_is_tried_again_later(
    builder: Builder, cache: FakeCache, clock: Any, error: Exception, pause_s: float
) -> None:
    cache.errors["b/1"] = error
    until_idle(builder)
    assert cache.tried == ["b/1", "c/1", "a/1"]

    clock.advance(pause_s - 3)
    assert not builder.step()
    clock.advance(3)
    cache.errors.clear()
    until_idle(builder)

    assert cache.tried[3:] == ["b/1"]
    assert cache.here >= {"b/1 encoder", "b/1 decoder"}


def test_a_failure_is_logged_with_its_code_and_once(
    builder: Builder, cache: FakeCache, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "workers.builder.builder.logger.error", lambda event, **facts: said.append(facts)
    )
    codes = ["dynamic_shape", "dynamic_shape", "engine_build_failed"]

    for code in codes:
        cache.errors["b/1"] = InvalidModel(code, "No.")
        until_idle(builder)
        clock.advance(AGAIN_S)

    assert [(facts["model"], facts["code"]) for facts in said] == [
        ("b/1", "dynamic_shape"),
        ("b/1", "engine_build_failed"),
    ]


def test_what_the_cache_has_lost_is_built_again(builder: Builder, cache: FakeCache) -> None:
    until_idle(builder)

    cache.here.discard("c/1 decoder")
    until_idle(builder)

    assert cache.tried[3:] == ["c/1"]


def test_engines_are_offered_to_the_store_again_now_and_then(
    builder: Builder, cache: FakeCache, installed: list[ModelCard], clock: Any
) -> None:
    del installed[1:]
    cache.errors["a/1 encoder"] = Transient("engine_store_unavailable", "Away.")
    until_idle(builder)
    until_idle(builder)
    assert cache.asked_to_share == []

    clock.advance(SHARE_EVERY_S)
    for _ in range(3):
        assert not builder.step(), "a store that is away is no reason to build"
    assert cache.asked_to_share == ["a/1 encoder"]

    cache.errors.clear()
    clock.advance(SHARE_EVERY_S)
    for _ in range(3):
        builder.step()
    assert cache.asked_to_share[1:] == ["a/1 encoder", "a/1 decoder"]
    assert cache.tried == ["a/1"]


def test_a_cache_too_small_for_all_is_not_turned_over_without_end(
    builder: Builder, cache: FakeCache, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_built = cache.see_built

    def with_room_for_one(card: ModelCard) -> list[str]:
        cache.here.clear()
        return see_built(card)

    monkeypatch.setattr(builder, "_see_built", with_room_for_one)

    for most in (2, 3, 4):
        until_idle(builder)
        assert max(Counter(cache.tried).values()) <= most
        clock.advance(AGAIN_S)


def test_failures_that_are_not_remembered_are_not_tried_without_end(
    cache: FakeCache, installed: list[ModelCard], clock: Any
) -> None:
    builder = build_for(lambda: installed, cache, clock, again_s=0.0)
    cache.errors["b/1"] = InvalidModel("unsupported_operator", "No such operator.")

    until_idle(builder)

    assert cache.tried == ["b/1", "c/1", "a/1"]


def test_content_that_replaced_a_version_is_another_version(
    builder: Builder, cache: FakeCache, installed: list[ModelCard]
) -> None:
    until_idle(builder)

    installed[0] = msgspec.structs.replace(installed[0], digest="another")
    until_idle(builder)

    assert cache.tried[3:] == ["a/1"]


def test_a_catalogue_that_is_away_is_the_processs_trouble(cache: FakeCache, clock: Any) -> None:
    def cards() -> list[ModelCard]:
        raise Transient("storage_unavailable", "Away.")

    builder = build_for(cards, cache, clock)

    with pytest.raises(Transient):
        builder.step()
