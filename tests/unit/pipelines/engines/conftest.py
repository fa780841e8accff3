"""Small ONNX models made on the spot, and caches in a folder of each test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.engines import EngineCache

FEATURES, CLASSES = 64, 48


def _float_io(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[..., Path]:
    """`classifier("model.onnx", seed=0, external=False)`: x float32[N, 64] to y float32[N, 48]."""

    def make(name: str = "model/model.onnx", *, seed: int = 0, external: bool = False) -> Path:
        random = np.random.default_rng(seed)
        weights = {
            "w1": random.standard_normal((FEATURES, 128), dtype=np.float32),
            "b1": random.standard_normal(128, dtype=np.float32),
            "w2": random.standard_normal((128, CLASSES), dtype=np.float32),
        }
        nodes = [
            helper.make_node("MatMul", ["x", "w1"], ["h"]),
            helper.make_node("Add", ["h", "b1"], ["hb"]),
            helper.make_node("Relu", ["hb"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "classifier",
            [_float_io("x", "N", FEATURES)],
            [_float_io("y", "N", CLASSES)],
            [numpy_helper.from_array(value, key) for key, value in weights.items()],
        )
        return _save(tmp_path / name, graph, external=external)

    return make


@pytest.fixture
def save_graph(tmp_path: Path) -> Callable[..., Path]:
    """`save_graph("name.onnx", graph)` for a test that needs a graph of its own."""
    return lambda name, graph, **options: _save(tmp_path / name, graph, **options)


def _save(
    path: Path, graph: onnx.GraphProto, *, external: bool = False, ir_version: int = 9
) -> Path:
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        (path.parent / "weights.bin").unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


@pytest.fixture
def batch() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((5, FEATURES), dtype=np.float32)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache", max_bytes=1 << 30)
