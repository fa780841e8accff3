"""What an engine says of its tensors: their types, and the shapes it takes in each bucket."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipelines.engines.engine import TensorSpec
from schemas.errors import InvalidModel

Shape = tuple[int, ...]

_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT8": np.dtype(np.int8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def dtype_of(name: str, dtype: Any) -> np.dtype[Any]:
    """dtype: TensorRT's. Raises InvalidModel for those that numpy does not have, such as BF16."""
    if dtype.name not in _DTYPES:
        raise InvalidModel(
            "unsupported_tensor_type",
            f"Expected inputs and outputs of {', '.join(sorted(_DTYPES))}, {name!r} is {dtype.name}; "
            "cast it to one of them inside the graph.",
        )
    return _DTYPES[dtype.name]


class Bucket(NamedTuple):
    """An optimisation profile. rows: its batch, None if the graph has no dynamic batch. smallest,
    largest: shapes by input, batch included."""

    profile: int
    rows: int | None
    smallest: dict[str, Shape]
    largest: dict[str, Shape]

    @property
    def fixed(self) -> bool:
        """Whether it takes one shape only, so that one CUDA graph does for all its runs."""
        return self.smallest == self.largest

    def takes(self, name: str, shape: Shape) -> bool:
        """shape: of a batch of any size."""
        bounds = zip(self.smallest[name], shape, self.largest[name], strict=True)
        return all(low <= size <= high for low, size, high in list(bounds)[1:])


class Tensors(NamedTuple):
    """batched: the inputs and outputs whose first axis is the batch. buckets: ascending, as built."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: frozenset[str]
    buckets: tuple[Bucket, ...]


def tensors_of(trt: Any, engine: Any) -> Tensors:
    """Raises InvalidModel for types that numpy does not have, and for tensors on the host."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for name in names:
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise InvalidModel(
                "dynamic_shape",
                f"Expected inputs and outputs in the GPU's memory, {name!r} is in the host's, because"
                " shapes are computed of it; export the graph so that it takes them from its data.",
            )
    specs = {name: _spec(engine, name) for name in names}
    is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
    inputs = tuple(specs[name] for name in names if is_input[name])
    batched = frozenset(name for name in names if (specs[name].shape or (0,))[0] is None)
    if batched.isdisjoint(spec.name for spec in inputs):
        batched = frozenset()
    return Tensors(
        inputs=inputs,
        outputs=tuple(specs[name] for name in names if not is_input[name]),
        batched=batched,
        buckets=tuple(
            _bucket(engine, profile, inputs, batched)
            for profile in range(engine.num_optimization_profiles)
        ),
    )


def _spec(engine: Any, name: str) -> TensorSpec:
    shape = tuple(None if axis == -1 else axis for axis in engine.get_tensor_shape(name))
    return TensorSpec(name, dtype_of(name, engine.get_tensor_dtype(name)), shape)


def _bucket(
    engine: Any, profile: int, inputs: tuple[TensorSpec, ...], batched: frozenset[str]
) -> Bucket:
    smallest: dict[str, Shape] = {}
    largest: dict[str, Shape] = {}
    for spec in inputs:
        shape = tuple(engine.get_tensor_shape(spec.name))
        if -1 not in shape:  # then profiles do not have it
            smallest[spec.name] = largest[spec.name] = shape
            continue
        low, _, high = engine.get_tensor_profile_shape(spec.name, profile)
        smallest[spec.name], largest[spec.name] = tuple(low), tuple(high)
    rows = [largest[spec.name][0] for spec in inputs if spec.name in batched]
    return Bucket(profile, min(rows) if rows else None, smallest, largest)
