"""From an ONNX file to OpenVINO's graph, and what the file calls its inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from pipelines.engines.engine import TensorSpec
from pipelines.engines.operators import unsupported_operators
from schemas.errors import InvalidModel

if TYPE_CHECKING:
    from onnx import ModelProto

_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "boolean": "bool",
}
_NO_RULE = re.compile(r"No conversion rule found for operations: .*")


class Tensor(Struct, frozen=True):
    """A TensorSpec as it is written beside the artefact."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, np.dtype(self.dtype), self.shape)


def read_graph(core: Any, model: Path) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The graph, its inputs and its outputs. Raises InvalidModel."""
    proto = _read_onnx(model)
    try:
        graph = core.read_model(str(model))
    except Exception as error:
        raise _refusal(model, str(error)) from error
    _refuse_float64(graph, model)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value.name for value in proto.graph.input if value.name not in weights]
    outputs = [value.name for value in proto.graph.output]
    return graph, _tensors(graph.inputs, inputs), _tensors(graph.outputs, outputs)


def last_line(error: object) -> str:
    """What went wrong; before it OpenVINO says where in its source that was noticed."""
    return next(reversed(str(error).strip().splitlines()), "nothing about it")


def _read_onnx(model: Path) -> ModelProto:
    """Without its external weights. OpenVINO would try a file that is no ONNX as TensorFlow and others."""
    import onnx

    try:
        proto = onnx.load(str(model), load_external_data=False)
    except Exception as error:  # protobuf's own DecodeError, whichever implementation is in use
        raise _unusable(model, str(error)) from error
    if not proto.graph.output:
        raise _unusable(model, "it holds no graph")
    return proto


def _tensors(ports: Sequence[Any], names: list[str]) -> list[Tensor]:
    """OpenVINO keeps their order, and has other names for them beside the file's."""
    if len(ports) != len(names) or any(
        name not in port.get_names() for port, name in zip(ports, names, strict=True)
    ):
        raise InvalidModel(
            "unusable_onnx",
            f"Expected inputs or outputs {names}, OpenVINO has {[p.get_names() for p in ports]}; "
            "use the backend onnxruntime.",
        )
    return [_tensor(port, name) for port, name in zip(ports, names, strict=True)]


def _tensor(port: Any, name: str) -> Tensor:
    kind = port.element_type.get_type_name()
    if kind not in _DTYPES:
        raise InvalidModel(
            "unsupported_tensor_type",
            f"Expected tensors of {', '.join(sorted(_DTYPES))}, {name!r} is {kind}; "
            "use the backend onnxruntime.",
        )
    shape = port.partial_shape
    if shape.rank.is_dynamic:
        return Tensor(name, _DTYPES[kind], None)
    axes = tuple(axis.get_length() if axis.is_static else None for axis in shape)
    return Tensor(name, _DTYPES[kind], axes)


def _refuse_float64(graph: Any, model: Path) -> None:
    for node in graph.get_ops():
        if any(port.element_type.get_type_name() == "f64" for port in node.outputs()):
            raise InvalidModel(
                "unsupported_tensor_type",
                f"Expected no float64 in {model.name}, {node.get_friendly_name()!r} has it and"
                " OpenVINO would compute it in float32; use the backend onnxruntime.",
            )


def _refusal(model: Path, said: str) -> InvalidModel:
    if missing := _NO_RULE.search(said):
        return unsupported_operators(model, "OpenVINO", missing[0])
    return _unusable(model, last_line(said))


def _unusable(model: Path, said: str) -> InvalidModel:
    return InvalidModel(
        "unusable_onnx",
        f"Expected an ONNX model that OpenVINO can read, for {model.name} it says: {said}; "
        "check the file with onnx.checker, its opset and its external data.",
    )
