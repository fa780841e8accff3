"""The default run step: one forward pass of the only engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.engines.engine import Engine
from pipelines.modalities import run_step
from schemas.errors import InvalidModel

Batch = dict[str, NDArray[Any]]


@run_step("forward")
def forward(bundle: Bundle) -> Callable[[dict[str, Engine], Batch], Batch]:
    """Numbers are converted to the engine's precision, such as int64 token ids to int32.
    A graph exported for batches of one only is run item by item."""
    if len(bundle.config.engines) != 1:
        raise InvalidModel(
            "model_step_invalid",
            f"forward: expected one engine, came {len(bundle.config.engines)};"
            " name a `run` step that knows them",
        )

    def run(engines: dict[str, Engine], inputs: Batch) -> Batch:
        (engine,) = engines.values()
        inputs = {name: _converted(engine, name, array) for name, array in inputs.items()}
        size = len(next(iter(inputs.values())))
        if size == 1 or not any(spec.shape and spec.shape[0] == 1 for spec in engine.inputs):
            return engine.run(inputs)
        items = [
            engine.run({name: array[i : i + 1] for name, array in inputs.items()})
            for i in range(size)
        ]
        return {name: np.concatenate([item[name] for item in items]) for name in items[0]}

    return run


def _converted(engine: Engine, name: str, array: NDArray[Any]) -> NDArray[Any]:
    for spec in engine.inputs:
        if spec.name == name and np.can_cast(array.dtype, spec.dtype, "same_kind"):
            return array.astype(spec.dtype, copy=False)
    return array
