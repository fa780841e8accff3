"""ONNX Runtime's CUDA provider on a GPU: its answers against the CPU's, its threads and limits.

Without a GPU and the package onnxruntime-gpu these are skipped, and the run's last lines say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from examples.models import efficientnet, minilm
from pipelines.engines.engine import DeviceOutOfMemory, Engine, Profile
from pipelines.engines.onnxruntime import open_unchanged
from pipelines.engines.onnxruntime_cuda import OnnxRuntimeCuda
from pipelines.engines.precision import difference
from schemas.errors import PipelineError
from tests.servers.process import NOT_TESTED

Arrays = dict[str, np.ndarray]

FLOAT32 = 1e-5
"""How far answers may be from the CPU's (see `difference`). With TF32 it would be 1e-3."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeCuda:
    """Where a model of one node loads; its absence is no failure, anything else is."""
    found = OnnxRuntimeCuda()
    folder = tmp_path_factory.mktemp("probe")
    found.compile(product(folder / "model.onnx"), Profile((1,)), folder)
    try:
        found.load(folder, threads=1).close()
    except PipelineError as error:
        if error.code not in ("backend_missing", "device_missing"):
            raise
        pytest.skip(f"{NOT_TESTED} a GPU by onnxruntime-cuda: {error.message}")
    return found


def product(path: Path) -> Path:
    """x float32[N, K] times w float32[K, 256]: y."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)
        for name, axes in (("x", ["N", 512]), ("y", ["N", 256]))
    ]
    weights = np.random.default_rng(0).standard_normal((512, 256), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    held = [numpy_helper.from_array(weights, "w")]
    return save(helper.make_graph([node], "product", ends[:1], ends[1:], held), path)


def save(graph: onnx.GraphProto, path: Path) -> Path:
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


@pytest.fixture
def engine(backend: OnnxRuntimeCuda, tmp_path: Path) -> Iterator[Engine]:
    artefact = tmp_path / "artefact"
    artefact.mkdir()
    backend.compile(product(tmp_path / "model.onnx"), Profile((1, 8)), artefact)
    loaded = backend.load(artefact, threads=1)
    yield loaded
    loaded.close()


def rows(count: int, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    return {"x": random.standard_normal((count, 512), dtype=np.float32)}


def expect_agreement(engine: Engine, model: Path, inputs: Arrays) -> None:
    came, right = engine.run(inputs), open_unchanged(model).run(inputs)
    assert list(came) == list(right)
    assert max(difference(came[name], right[name]) for name in right) < FLOAT32


@pytest.mark.parametrize("count", [1, 3, 8, 64])
def test_products_are_those_of_the_cpu(engine: Engine, tmp_path: Path, count: int) -> None:
    expect_agreement(engine, tmp_path / "model.onnx", rows(count))


def test_photographs_are_classified_alike(backend: OnnxRuntimeCuda, tmp_path: Path) -> None:
    efficientnet.build(tmp_path / "bundle")
    random = np.random.default_rng(0)
    images = random.standard_normal((4, 3, 224, 224), dtype=np.float32)
    expect_agreement(*load(backend, tmp_path), {"images": images})


def test_sentences_are_read_alike(backend: OnnxRuntimeCuda, tmp_path: Path) -> None:
    minilm.build_embedder(tmp_path / "bundle")
    ids = np.random.default_rng(0).integers(1000, 30000, (4, 13))
    mask = np.ones_like(ids)
    mask[1:, 5:] = 0
    expect_agreement(*load(backend, tmp_path), {"input_ids": ids, "attention_mask": mask})


def load(backend: OnnxRuntimeCuda, folder: Path) -> tuple[Engine, Path]:
    model, artefact = folder / "bundle" / "model.onnx", folder / "artefact"
    artefact.mkdir()
    backend.compile(model, Profile((1, 4)), artefact)
    return backend.load(artefact, threads=1), model


def test_several_threads_run_one_engine_at_once(engine: Engine) -> None:
    batches = [rows(1 + n % 8, seed=n) for n in range(200)]
    alone = [engine.run(batch)["y"] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: engine.run(batch)["y"], batches))
    assert max(map(difference, together, alone)) < FLOAT32


def test_a_batch_without_room_on_the_device_may_be_retried(
    backend: OnnxRuntimeCuda, tmp_path: Path
) -> None:
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    node = helper.make_node("ConstantOfShape", ["shape"], ["y"])
    (tmp_path / "bundle").mkdir()
    save(helper.make_graph([node], "zeros", [shape], [y]), tmp_path / "bundle" / "model.onnx")
    engine, _ = load(backend, tmp_path)
    with pytest.raises(DeviceOutOfMemory):
        engine.run({"shape": np.array([1 << 20, 1 << 20])})  # 4 TiB
    assert engine.run({"shape": np.array([2, 3])})["y"].shape == (2, 3)
