"""Models in memory: loaded once, kept under a budget, never taken from under a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from schemas.errors import InvalidModel, Transient
from workers.inference.residency import STAY_S, Residency

Soon = Callable[[threading.Event], None]


class Loaded:
    """What residency uses of a loaded model. users: how many runs it must not be closed under."""

    def __init__(self, name: str, memory_bytes: int) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self.premium = name.startswith("premium")
        self.users = 0
        self.closed = 0

    def close(self) -> None:
        assert self.users == 0, f"{self.name} was closed while it was in use"
        self.closed += 1


class Loader:
    """Loads a model of 10 bytes, or of as many as its name says: `big-50`. loaded: all it ever did."""

    def __init__(self) -> None:
        self.loaded: list[Loaded] = []
        self.failures: list[Exception] = []
        self.during: Callable[[str], None] = lambda name: None

    def __call__(self, name: str, version: int) -> Any:
        self.during(name)
        if self.failures:
            raise self.failures.pop()
        model = Loaded(name, int(name.partition("-")[2] or 10))
        self.loaded.append(model)
        return model

    def open(self) -> list[str]:
        return [model.name for model in self.loaded if not model.closed]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def residency(loader: Loader, clock: Any) -> Residency:
    return Residency(loader, 20, clock.monotonic)


def use(residency: Residency, *names: str) -> None:
    for name in names:
        with residency.use(name, 1):
            pass


def test_a_model_is_loaded_when_it_is_first_used_and_stays(
    residency: Residency, loader: Loader
) -> None:
    with residency.use("a", 1) as first:
        pass
    with residency.use("a", 1) as second:
        pass

    assert first is second
    assert len(loader.loaded) == 1
    assert residency.names() == ["a/1"]
    assert residency.memory_bytes == 10


def test_versions_are_models_of_their_own(residency: Residency) -> None:
    with residency.use("a", 1) as one, residency.use("a", 2) as two:
        assert one is not two
        assert residency.names() == ["a/1", "a/2"]


def test_many_who_want_a_model_at_once_load_it_once(
    residency: Residency, loader: Loader, crew: Any
) -> None:
    start, all_in = threading.Barrier(8), threading.Barrier(8)
    seen: list[Any] = []

    def want() -> None:
        start.wait(20)
        with residency.use("a", 1) as model:
            seen.append(model)
            all_in.wait(20)

    for _ in range(8):
        crew.run(want)
    crew.join()

    assert len(loader.loaded) == 1
    assert len(set(map(id, seen))) == 1


def test_two_models_load_side_by_side(residency: Residency, loader: Loader, crew: Any) -> None:
    both = threading.Barrier(2)

    def meet(name: str) -> None:
        both.wait(20)

    loader.during = meet

    crew.run(use, residency, "a")
    crew.run(use, residency, "b")
    crew.join()

    assert sorted(residency.names()) == ["a/1", "b/1"]


def test_a_model_is_at_hand_while_another_loads(
    residency: Residency, loader: Loader, crew: Any, soon: Soon
) -> None:
    use(residency, "a")
    loading, go_on = threading.Event(), threading.Event()

    def slowly(name: str) -> None:
        loading.set()
        soon(go_on)

    loader.during = slowly
    crew.run(use, residency, "b")
    soon(loading)
    use(residency, "a")
    assert residency.names() == ["a/1"]
    go_on.set()


def test_premium_models_go_last(residency: Residency, loader: Loader) -> None:
    use(residency, "premium", "a", "b", "c")
    assert loader.open() == ["premium", "c"]

    use(residency, "premium2", "premium3")

    assert loader.open() == ["premium2", "premium3"]


def test_a_model_that_came_a_moment_ago_stays_if_an_older_one_can_go(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    use(residency, "old")
    clock.advance(STAY_S)
    use(residency, "young", "old")

    use(residency, "new")

    assert loader.open() == ["young", "new"]


def test_over_the_budget_the_least_recently_used_goes(residency: Residency, loader: Loader) -> None:
    use(residency, "a", "b", "a", "c")

    assert residency.names() == ["a/1", "c/1"]
    assert loader.open() == ["a", "c"]
    assert residency.memory_bytes == 20


def test_as_many_go_as_are_needed(residency: Residency, loader: Loader) -> None:
    use(residency, "a", "b", "big-20")

    assert residency.names() == ["big-20/1"]
    assert loader.open() == ["big-20"]


def test_a_model_in_use_is_never_dropped_but_goes_when_it_is_free(
    residency: Residency, loader: Loader
) -> None:
    with residency.use("a", 1) as a, residency.use("b", 1):
        a.users += 1  # type: ignore[attr-defined]
        with residency.use("c", 1):
            assert residency.memory_bytes == 30
        assert loader.open() == ["a", "b"]
        a.users -= 1  # type: ignore[attr-defined]

    assert residency.memory_bytes <= 20


def test_an_idle_model_makes_room_before_a_run_not_after_it(
    residency: Residency, loader: Loader
) -> None:
    """Over the budget only for as long as more models are in use at once than fit."""
    use(residency, "a", "b")

    with residency.use("c", 1):
        assert residency.memory_bytes <= 20
        assert loader.open() == ["b", "c"]


def test_a_model_that_was_dropped_is_loaded_again(residency: Residency, loader: Loader) -> None:
    use(residency, "a", "b", "c", "a")

    assert [model.name for model in loader.loaded] == ["a", "b", "c", "a"]
    assert loader.loaded[0].closed == 1
    assert loader.open() == ["c", "a"]


@pytest.mark.parametrize(
    "failure", [Transient("x", "x"), InvalidModel("x", "x"), ZeroDivisionError()]
)
def test_a_load_that_fails_leaves_no_trace(
    residency: Residency, loader: Loader, failure: Exception
) -> None:
    loader.failures = [failure]

    with pytest.raises(type(failure)), residency.use("a", 1):
        raise AssertionError("there is no model to use")

    assert residency.names() == []
    assert residency.memory_bytes == 0
    assert residency._places == {}
    use(residency, "a")
    assert residency.names() == ["a/1"]


def test_those_who_waited_for_a_load_that_failed_try_themselves(
    residency: Residency, loader: Loader, crew: Any
) -> None:
    loader.failures = [Transient("x", "x")]
    start = threading.Barrier(4)
    failed: list[Exception] = []
    got: list[Any] = []

    def want() -> None:
        start.wait(20)
        try:
            with residency.use("a", 1) as model:
                got.append(model)
        except Transient as error:
            failed.append(error)

    for _ in range(4):
        crew.run(want)
    crew.join()

    assert (len(failed), len(got)) == (1, 3)
    assert len(loader.loaded) == 1


def test_an_error_in_the_block_leaves_the_model_free(residency: Residency, loader: Loader) -> None:
    with pytest.raises(ZeroDivisionError), residency.use("a", 1):
        raise ZeroDivisionError
    use(residency, "b", "c")

    assert loader.open() == ["b", "c"]


def test_closing_closes_every_model_once(residency: Residency, loader: Loader) -> None:
    use(residency, "a", "b")

    residency.close()
    residency.close()

    assert [model.closed for model in loader.loaded] == [1, 1]
    assert residency.names() == []


def test_many_threads_and_models_keep_to_the_budget_when_they_are_done(
    residency: Residency, loader: Loader, crew: Any
) -> None:
    lock = threading.Lock()

    def work(seed: int) -> None:
        for turn in range(30):
            with residency.use(f"m{(seed * 7 + turn * 3) % 5}", 1) as model:
                loaded: Any = model
                assert not loaded.closed
                with lock:
                    loaded.users += 1
                with lock:
                    loaded.users -= 1

    for seed in range(6):
        crew.run(work, seed)
    crew.join()

    assert residency.memory_bytes <= 20
    assert len(loader.open()) == len(residency.names())
    assert all(model.closed <= 1 for model in loader.loaded)
