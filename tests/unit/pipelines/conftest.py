"""Bundles made on the spot, and engines that are a numpy function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipelines.bundle import Bundle
from pipelines.engines.engine import Arrays, Engine, TensorSpec

MakeBundle = Callable[..., Bundle]


class NumpyEngine(Engine):
    """Runs a function and remembers the batches it was given."""

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: Callable[[Arrays], dict[str, Any]],
    ) -> None:
        super().__init__(inputs, outputs, memory_bytes=0)
        self.batches: list[Arrays] = []
        self._function = function

    def _run(self, inputs: Arrays) -> dict[str, Any]:
        self.batches.append(inputs)
        return self._function(inputs)

    def _close(self) -> None:
        pass


@pytest.fixture
def make_engine() -> Callable[..., NumpyEngine]:
    """`make_engine(function, x=("float32", (None, 3)))`; its outputs are not declared."""

    def make(
        function: Callable[[Arrays], dict[str, Any]], **inputs: tuple[str, tuple[int | None, ...]]
    ) -> NumpyEngine:
        specs = [
            TensorSpec(name, np.dtype(dtype), shape) for name, (dtype, shape) in inputs.items()
        ]
        return NumpyEngine(specs, [], function)

    return make


@pytest.fixture
def identity_graph() -> onnx.ModelProto:
    """x float32[N, 3] to y."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


MODEL_YAML = """\
name: tiny
version: 1
modality: {modality}
engines:
  main: {{file: model.onnx}}
preprocess: {preprocess}
postprocess: {postprocess}
{more}
"""


@pytest.fixture
def bundle_folder(tmp_path: Path, identity_graph: onnx.ModelProto) -> Path:
    """A good bundle to spoil: an identity over three numbers."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    onnx.save(identity_graph, folder / "model.onnx")
    (folder / "model.yaml").write_text(
        MODEL_YAML.format(
            modality="tensor",
            preprocess="[{from_buffer: {input: x, dtype: float32, shape: [3]}}]",
            postprocess="[{tensor: {}}]",
            more="",
        )
    )
    return folder


@pytest.fixture
def make_bundle(bundle_folder: Path) -> MakeBundle:
    """A bundle whose model.yaml says this."""

    def make(
        preprocess: str = "[{from_buffer: {input: x, dtype: float32, shape: [3]}}]",
        postprocess: str = "[{tensor: {}}]",
        modality: str = "tensor",
        more: str = "",
    ) -> Bundle:
        text = MODEL_YAML.format(
            modality=modality, preprocess=preprocess, postprocess=postprocess, more=more
        )
        (bundle_folder / "model.yaml").write_text(text)
        return Bundle.open(bundle_folder)

    return make
