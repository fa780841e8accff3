"""A thin pencil for ONNX graphs: every value is a name, every call draws one node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Shape = list[int | str]
"""A dimension is a number, or a name if it may differ from call to call."""


class Graph:
    """Nodes, constants, inputs and outputs on their way into an ONNX file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        self._inputs.append(_described(name, dtype, shape))
        return name

    def constant(self, value: NDArray[np.generic] | float) -> str:
        """A weight or a number; a bare number becomes a float32 scalar."""
        array = value if isinstance(value, np.ndarray) else np.float32(value)
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output, whose name is returned."""
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def output(self, name: str, value: str, dtype: type[np.generic], shape: Shape) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(_described(name, dtype, shape))

    def save(self, path: Path) -> None:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, self._constants
        )
        # Opset 17 in file format 8: new enough for LayerNormalization, old enough for any runtime.
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _described(name: str, dtype: type[np.generic], shape: Shape) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, shape)
