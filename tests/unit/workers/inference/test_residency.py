"""Models in memory: loaded once, kept under a budget, never taken from under a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from pipelines.engines import DeviceOutOfMemory
from schemas.errors import InvalidModel, Transient
from workers.inference.residency import STAY_LOADS, STAY_MOST_S, Residency, Wanted

Soon = Callable[[threading.Event], None]


class Loaded:
    """What residency uses of a loaded model. users: how many runs it must not be closed under."""

    def __init__(self, name: str, memory_bytes: int) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self.users = 0
        self.closed = 0

    def close(self) -> None:
        assert self.users == 0, f"{self.name} was closed while it was in use"
        self.closed += 1


class Loader:
    """Loads a model of 10 bytes, or of as many as its name says: `big-50`. expected: bytes, where they are wrong.
    loaded: all it ever did."""

    def __init__(self) -> None:
        self.loaded: list[Loaded] = []
        self.expected: dict[str, int] = {}
        self.missing: Exception | None = None
        self.failures: list[Exception] = []
        self.during: Callable[[str], None] = lambda name: None

    def __call__(self, name: str, version: int) -> Wanted:
        memory_bytes = int(name.partition("-")[2] or 10)

        def load(make_room: Callable[[], None]) -> Any:
            if self.missing:
                raise self.missing
            make_room()
            self.during(name)
            if self.failures:
                raise self.failures.pop()
            model = Loaded(name, memory_bytes)
            self.loaded.append(model)
            return model

        expected_bytes = self.expected.get(name, memory_bytes)
        return Wanted(expected_bytes, name.startswith("premium"), load)

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


def test_a_premium_model_goes_for_nobody_but_another_premium_one(
    residency: Residency, loader: Loader
) -> None:
    use(residency, "premium", "a", "b", "c")
    assert loader.open() == ["premium", "c"]

    with residency.use("c", 1), pytest.raises(Transient) as refused:
        use(residency, "big-20")
    assert refused.value.code == "engine_memory_full"
    assert loader.open() == ["premium", "c"]

    use(residency, "premium2", "premium3")
    assert loader.open() == ["premium2", "premium3"]


def test_models_that_take_turns_are_not_loaded_for_every_batch(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    """A load takes a second, a batch a tenth of one: most of the time goes into runs."""
    loader.during = lambda name: clock.advance(1)
    began, runs, refused = clock.monotonic(), 0, 0
    for turn in range(1000):
        try:
            with residency.use(f"big{turn % 2}-20", 1):
                clock.advance(0.1)
                runs += 1
        except Transient:
            refused += 1
            clock.advance(0.1)

    took_s = clock.monotonic() - began
    assert len(loader.loaded) <= 1 + took_s / STAY_LOADS  # each takes a second
    assert runs > 400
    assert {model.name for model in loader.loaded} == {"big0-20", "big1-20"}


def test_however_many_models_are_held_most_of_the_time_goes_into_runs(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    """Ten of twenty fit: each holds its place for longer than if it were alone."""
    loader.during = lambda name: clock.advance(0.1)
    began = clock.monotonic()
    for turn in range(5000):
        with suppress(Transient), residency.use(f"m{turn % 20}-2", 1):
            pass
        clock.advance(0.05)

    loading_s = 0.1 * len(loader.loaded)
    assert loading_s <= (clock.monotonic() - began) / STAY_LOADS + 10 * 0.1
    assert len(loader.loaded) > 10


def test_a_newcomer_whose_engine_is_not_there_takes_nobodys_place(
    residency: Residency, loader: Loader
) -> None:
    use(residency, "a", "b")
    loader.missing = Transient("engine_not_built", "Not yet.")

    with pytest.raises(Transient):
        use(residency, "premium")

    assert loader.open() == ["a", "b"]


def test_a_slow_load_does_not_keep_its_place_for_ever(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    loader.during = lambda name: clock.advance(600)
    use(residency, "big-20")
    clock.advance(STAY_MOST_S)

    use(residency, "a")

    assert loader.open() == ["a"]


def test_a_premium_model_need_not_wait_for_one_that_came_a_moment_ago(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    loader.during = lambda name: clock.advance(1)
    use(residency, "big-20", "premium")

    assert loader.open() == ["premium"]


def test_a_model_that_came_a_moment_ago_stays_if_an_older_one_can_go(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    loader.during = lambda name: clock.advance(1)
    use(residency, "old")
    clock.advance(STAY_LOADS)
    use(residency, "young", "old")

    use(residency, "new")

    assert loader.open() == ["young", "new"]


def test_room_is_made_before_a_model_is_loaded(residency: Residency, loader: Loader) -> None:
    """On a device that has no more than the budget, the load would fail each time."""
    held: list[int] = []
    loader.during = lambda name: held.append(residency.memory_bytes)

    use(residency, "a", "b", "big-20")

    assert held == [0, 10, 0]


def test_a_model_that_is_larger_than_expected_makes_room_when_that_is_known(
    residency: Residency, loader: Loader
) -> None:
    loader.expected["big-20"] = 5
    use(residency, "a", "big-20")

    assert loader.open() == ["big-20"]


def test_a_device_that_is_full_before_the_budget_is_gets_room_and_is_asked_once_more(
    residency: Residency, loader: Loader
) -> None:
    use(residency, "a")
    loader.failures = [DeviceOutOfMemory("Full.")]

    with pytest.raises(Transient) as refused:
        use(residency, "b")
    assert refused.value.code == "engine_memory_full"
    assert loader.open() == []
    use(residency, "b")

    assert loader.open() == ["b"]


def test_a_device_that_is_too_small_for_the_model_alone_is_told(
    residency: Residency, loader: Loader
) -> None:
    loader.failures = [DeviceOutOfMemory("Full.")]

    with pytest.raises(DeviceOutOfMemory):
        use(residency, "a")


def test_a_device_that_is_full_of_what_has_to_stay_is_no_fault_of_the_job(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    loader.during = lambda name: clock.advance(1)
    use(residency, "a")
    loader.failures = [DeviceOutOfMemory("Full.")]

    with pytest.raises(Transient) as refused:
        use(residency, "b")

    assert refused.value.code == "engine_memory_full"
    assert loader.open() == ["a"]


@pytest.mark.parametrize("large", [["big-20"], ["big-20", "big2-20", "large-18"]])
def test_a_large_model_gets_its_turn_however_many_small_ones_take_theirs(
    residency: Residency, loader: Loader, clock: Any, large: list[str]
) -> None:
    """It needs all that is held to leave at once."""
    loader.during = lambda name: clock.advance(0.5)
    served = []
    for turn in range(9000):
        name = large[turn // 11 % len(large)] if turn % 11 == 0 else f"small{turn % 7}-4"
        with suppress(Transient), residency.use(name, 1):
            served.append(name)
        clock.advance(0.2)

    thirds = [served[i * len(served) // 3 : (i + 1) * len(served) // 3] for i in range(3)]
    assert all(name in third for third in thirds for name in large)
    assert len(set(served)) == 7 + len(large)


def test_a_model_that_premium_ones_leave_no_room_for_keeps_no_others_from_theirs(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    use(residency, "premium", "a")
    for _ in range(20):
        clock.advance(10)
        with pytest.raises(Transient):
            use(residency, "big-20")

    use(residency, "b")

    assert loader.open() == ["premium", "b"]


def test_what_nobody_asked_for_yet_takes_nobodys_place(
    residency: Residency, loader: Loader
) -> None:
    use(residency, "a")
    with residency.use("b", 1, displace=False):
        pass

    with pytest.raises(Transient), residency.use("c", 1, displace=False):
        raise AssertionError("there is no room for it")

    assert loader.open() == ["a", "b"]


def test_a_device_that_is_full_until_runs_end_is_no_fault_of_the_job(
    residency: Residency, loader: Loader
) -> None:
    with residency.use("a", 1):
        loader.failures = [DeviceOutOfMemory("Full.")]
        with pytest.raises(Transient) as refused:
            use(residency, "b")
        assert refused.value.code == "engine_memory_full"

    use(residency, "b")

    assert loader.open() == ["b"]


def test_no_more_leave_a_full_device_than_the_newcomer_needs(
    residency: Residency, loader: Loader
) -> None:
    use(residency, "small-5", "other-5")
    loader.failures = [DeviceOutOfMemory("Full.")]

    with pytest.raises(Transient):
        use(residency, "new-5")

    assert loader.open() == ["other-5"]


def test_a_model_that_does_not_close_is_no_matter_of_the_batch(
    residency: Residency, loader: Loader
) -> None:
    def refuse() -> None:
        raise RuntimeError("no")

    use(residency, "a")
    loader.loaded[0].close = refuse  # type: ignore[method-assign]

    use(residency, "big-20")

    assert residency.names() == ["big-20/1"]


def test_what_is_being_loaded_is_told_with_its_begin(
    residency: Residency, loader: Loader, clock: Any
) -> None:
    told: list[dict[str, float]] = []
    loader.during = lambda name: told.append(residency.loading())

    use(residency, "a")

    assert told == [{"a/1": clock.monotonic()}]
    assert residency.loading() == {}


def test_over_the_budget_the_least_recently_used_goes(residency: Residency, loader: Loader) -> None:
    use(residency, "a", "b", "a", "c")

    assert residency.names() == ["a/1", "c/1"]
    assert loader.open() == ["a", "c"]
    assert residency.memory_bytes == 20


def test_as_many_go_as_are_needed(residency: Residency, loader: Loader) -> None:
    use(residency, "a", "b", "big-20")

    assert residency.names() == ["big-20/1"]
    assert loader.open() == ["big-20"]


def test_a_model_in_use_goes_when_its_runs_end_and_takes_no_new_ones(
    residency: Residency, loader: Loader
) -> None:
    with residency.use("a", 1) as a, residency.use("b", 1):
        a.users += 1  # type: ignore[attr-defined]
        with residency.use("c", 1):
            assert residency.memory_bytes == 30
            assert residency.names() == ["b/1", "c/1"]
            with pytest.raises(Transient) as refused:
                use(residency, "a")
            assert refused.value.code == "engine_memory_full"
        assert loader.open() == ["a", "b", "c"]
        a.users -= 1  # type: ignore[attr-defined]

    assert loader.open() == ["b", "c"]


def test_an_idle_model_makes_room_before_a_run_not_after_it(
    residency: Residency, loader: Loader
) -> None:
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
            with (
                suppress(Transient),  # no room just now
                residency.use(f"m{(seed * 7 + turn * 3) % 5}", 1) as model,
            ):
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
