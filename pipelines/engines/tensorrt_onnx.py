"""From an ONNX file to TensorRT's network, and the shapes that each optimisation profile takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.engines.engine import Profile
from pipelines.engines.tensorrt_library import Library
from pipelines.engines.tensorrt_tensors import Shape, dtype_of
from schemas.errors import InvalidModel
from schemas.models import ShapeRange

Shapes = dict[str, tuple[Shape, Shape, Shape]]
"""By input: smallest, best and largest, batch included."""


def parse(library: Library, builder: Any, model: Path) -> tuple[Any, Any]:
    """The network, and the parser, which holds its weights until the plan is built.

    Strongly typed: precision is what the graph says. Raises InvalidModel with all the parser says.
    """
    trt = library.trt
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(model)):
        raise _refusal(trt, model, [parser.get_error(i) for i in range(parser.num_errors)])
    if not network.num_outputs:  # an empty file is a valid one, of a model without a graph
        raise InvalidModel(
            "unusable_onnx",
            f"Expected a graph with outputs, {model.name} has none; export the model anew.",
        )
    for tensor in _inputs(network):
        if tensor.is_shape_tensor:
            raise InvalidModel(
                "dynamic_shape",
                f"Expected inputs that are data, {tensor.name!r} of {model.name} is the shape of "
                "another tensor; export the graph so that it takes that shape from its data.",
            )
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in [*_inputs(network), *outputs]:
        dtype_of(tensor.name, tensor.dtype)
    return network, parser


def profile_shapes(network: Any, profile: Profile, model: Path) -> list[Shapes]:
    """Of the dynamic inputs, for each bucket: the batch fixed, so that kernels are chosen for just that
    shape and one CUDA graph can replay it. Where no batch is dynamic there is one bucket, and none
    where no input is. Raises InvalidModel for a dynamic axis of which nothing is known."""
    inputs = {tensor.name: tuple(tensor.shape) for tensor in _inputs(network)}
    if unknown := sorted(profile.ranges.keys() - inputs.keys()):
        raise InvalidModel(
            "dynamic_shape",
            f"Expected `shapes` of the inputs {sorted(inputs)} of {model.name}, got {unknown}; "
            "name them as the graph does.",
        )
    dynamic = {name: shape for name, shape in inputs.items() if -1 in shape}
    if not dynamic:
        return []
    batched = any(shape[0] == -1 for shape in dynamic.values())
    return [
        {
            name: _shapes(name, shape, rows, profile.ranges.get(name), model)
            for name, shape in dynamic.items()
        }
        for rows in (profile.buckets if batched else profile.buckets[:1])
    ]


def _shapes(
    name: str, shape: Shape, rows: int, taken: ShapeRange | None, model: Path
) -> tuple[Shape, Shape, Shape]:
    batch, *rest = (rows, *shape[1:]) if shape[0] == -1 else shape
    if taken is None and -1 not in rest:
        taken = ShapeRange(tuple(rest), tuple(rest), tuple(rest))
    if taken is None or not _fits(taken, rest):
        axes = ", ".join("?" if axis == -1 else str(axis) for axis in rest)
        came = f"{taken.min} to {taken.max}, best {taken.opt}" if taken else "none"
        raise InvalidModel(
            "dynamic_shape",
            f"Expected bounds for the dynamic axes of input {name!r} of {model.name}, whose items are "
            f"[{axes}], got {came}; say `shapes: {{{name}: {{min: [...], opt: [...], max: [...]}}}}` "
            "at this engine in model.yaml, without the batch, or export the graph with fixed axes.",
        )
    return (batch, *taken.min), (batch, *taken.opt), (batch, *taken.max)


def _fits(taken: ShapeRange, rest: Sequence[int]) -> bool:
    if {len(taken.min), len(taken.opt), len(taken.max)} != {len(rest)}:
        return False
    axes = zip(rest, taken.min, taken.opt, taken.max, strict=True)
    return all(
        low <= best <= high and (axis == -1 or low == high == axis)
        for axis, low, best, high in axes
    )


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _refusal(trt: Any, model: Path, problems: Sequence[Any]) -> InvalidModel:
    unsupported = any(
        problem.code().name.startswith("UNSUPPORTED_NODE") or "Plugin not found" in problem.desc()
        for problem in problems
    )
    said = (
        f"Expected an ONNX model that {trt.__name__} {trt.__version__} takes, for {model.name} its "
        f"parser says: {'; '.join(map(_described, problems))}; "
    )
    if unsupported:
        remedy = "export the graph with other operators, or use the backend onnxruntime."
        return InvalidModel("unsupported_operator", said + remedy)
    remedy = "check the file with onnx.checker, its opset and its external data."
    return InvalidModel("unusable_onnx", said + remedy)


def _described(problem: Any) -> str:
    says = f"{problem.code().name}: {problem.desc()}"
    if problem.node() < 0:
        return says
    return f"operator {problem.node_operator()} of node {problem.node_name()!r}: {says}"
