from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from pipelines.engines.engine import Array, Arrays, DeviceOutOfMemory, Engine, TensorSpec
from schemas.errors import InferenceFailed, Transient


class Doubling(Engine):
    """Doubles its input; can be held up in the middle of a run."""

    def __init__(self) -> None:
        spec = TensorSpec("x", np.dtype(np.float32), (None, 3))
        super().__init__([spec], [spec], memory_bytes=12)
        self.during_run: Callable[[], object] = lambda: None
        self.closings = 0

    def _run(self, inputs: Arrays) -> dict[str, Array]:
        self.during_run()
        return {"x": inputs["x"] * 2}

    def _close(self) -> None:
        self.closings += 1


@pytest.fixture
def engine() -> Doubling:
    return Doubling()


def ones(*shape: int, dtype: str = "float32") -> Array:
    return np.ones(shape, dtype)


def test_right_inputs_reach_the_backend(engine: Doubling) -> None:
    assert (engine.run({"x": ones(2, 3)})["x"] == 2).all()
    assert engine.run({"x": ones(0, 3)})["x"].shape == (0, 3)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"y": ones(1, 3)}, {"x": ones(1, 3), "y": ones(1, 3)}],
    ids=["missing", "renamed", "one too many"],
)
def test_wrong_names_are_refused_with_the_right_ones(engine: Doubling, inputs: Arrays) -> None:
    with pytest.raises(InferenceFailed) as refused:
        engine.run(inputs)
    assert refused.value.code == "wrong_engine_inputs"
    assert f"Expected the inputs ['x'], got {sorted(inputs)}" in refused.value.message


@pytest.mark.parametrize(
    ("array", "came"),
    [
        (ones(1, 3, dtype="float64"), "float64[1, 3]"),
        (ones(1, 3, dtype=">f4"), ">f4[1, 3]"),
        (ones(3), "float32[3]"),
        (ones(1, 3, 1), "float32[1, 3, 1]"),
        (ones(1, 4), "float32[1, 4]"),
    ],
)
def test_wrong_dtype_rank_or_axis_is_refused_saying_what_came(
    engine: Doubling, array: Array, came: str
) -> None:
    with pytest.raises(InferenceFailed) as refused:
        engine.run({"x": array})
    assert refused.value.code == "wrong_engine_input"
    assert f"Expected float32[N, 3] for input 'x', got {came}" in refused.value.message


def test_an_unknown_rank_admits_any_shape_but_not_any_dtype() -> None:
    spec = TensorSpec("x", np.dtype(np.int64), None)
    assert spec.admits(ones(2, 2, dtype="int64"))
    assert not spec.admits(ones(2, 2))
    assert str(spec) == "int64[...]"


def test_strings_may_come_with_a_fixed_width() -> None:
    spec = TensorSpec("text", np.dtype(object), (None,))
    assert spec.admits(np.array(["a", "bc"]))
    assert spec.admits(np.array(["a", "bc"], object))
    assert not spec.admits(ones(2))


def test_a_closed_engine_refuses_to_run_and_closes_once(engine: Doubling) -> None:
    ended: list[int] = []
    engine.after_close(lambda: ended.append(engine.closings))
    engine.close()
    engine.close()
    assert engine.closings == 1
    assert ended == [1], "called once, and after the memory was freed"
    with pytest.raises(Transient) as refused:
        engine.run({"x": ones(1, 3)})
    assert refused.value.code == "engine_closed"


def test_close_waits_for_the_runs_under_way(engine: Doubling) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold_up() -> None:
        inside.set()
        assert go_on.wait(30)
        assert engine.closings == 0

    engine.during_run = hold_up
    answers: list[dict[str, Array]] = []
    running = threading.Thread(target=lambda: answers.append(engine.run({"x": ones(1, 3)})))
    closing = threading.Thread(target=engine.close)
    running.start()
    assert inside.wait(30)
    closing.start()
    go_on.set()
    running.join(30)
    closing.join(30)
    assert (answers[0]["x"] == 2).all()
    assert engine.closings == 1


def test_a_failed_run_leaves_the_engine_usable(engine: Doubling) -> None:
    def fail() -> None:
        raise InferenceFailed("engine_failed", "no")

    engine.during_run = fail
    with pytest.raises(InferenceFailed):
        engine.run({"x": ones(1, 3)})
    engine.during_run = lambda: None
    assert engine.run({"x": ones(1, 3)})
    engine.close()
    assert engine.closings == 1


def test_out_of_memory_is_retryable() -> None:
    error = DeviceOutOfMemory("Expected room")
    assert isinstance(error, Transient)
    assert (error.code, error.message) == ("device_out_of_memory", "Expected room")
