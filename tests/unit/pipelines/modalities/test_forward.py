from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipelines.bundle import Bundle
from pipelines.modalities.forward import forward
from schemas.errors import InferenceFailed


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle()


def test_a_batch_goes_through_the_only_engine_at_once(
    bundle: Bundle, make_engine: Callable
) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"] * 2}, x=("float32", (None, 3)))
    outputs = forward(bundle)({"main": engine}, {"x": np.ones((4, 3), np.float32)})
    assert outputs["y"].tolist() == [[2, 2, 2]] * 4
    assert len(engine.batches) == 1


@pytest.mark.parametrize(
    ("came", "wanted"), [("int64", "int32"), ("float32", "float16"), ("uint8", "float32")]
)
def test_numbers_are_converted_to_the_engines_precision(
    bundle: Bundle, make_engine: Callable, came: str, wanted: str
) -> None:
    engine = make_engine(lambda inputs: dict(inputs), x=(wanted, (None,)))
    assert forward(bundle)({"main": engine}, {"x": np.ones(2, came)})["x"].dtype == wanted


def test_numbers_are_not_converted_to_another_kind(bundle: Bundle, make_engine: Callable) -> None:
    engine = make_engine(lambda inputs: dict(inputs), x=("int64", (None,)))
    with pytest.raises(InferenceFailed, match="float32"):
        forward(bundle)({"main": engine}, {"x": np.ones(2, np.float32)})


def test_a_graph_for_one_item_runs_item_by_item(bundle: Bundle, make_engine: Callable) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"].sum(axis=1)}, x=("float32", (1, 3)))
    batch = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert forward(bundle)({"main": engine}, {"x": batch})["y"].tolist() == [3, 12, 21]
    assert len(engine.batches) == 3
