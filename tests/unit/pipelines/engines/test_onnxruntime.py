from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.engines.engine import DeviceOutOfMemory, Profile
from pipelines.engines.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from schemas.errors import InferenceFailed, InvalidModel

MakeModel = Callable[..., Path]
PROFILE = Profile(buckets=(1, 8))


@pytest.fixture(scope="session")
def backend() -> OnnxRuntime:
    return OnnxRuntime()


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir()
    return folder


def optimised_by_the_vendor(model: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime answers when it loads the model itself, with all optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("external", [False, True], ids=["inline weights", "external weights"])
def test_answers_are_bitwise_those_of_the_vendor_and_need_the_artefact_only(
    backend: OnnxRuntime, classifier: MakeModel, artefact: Path, batch: np.ndarray, external: bool
) -> None:
    model = classifier(external=external)
    expected = optimised_by_the_vendor(model, {"x": batch})
    backend.compile(model, PROFILE, artefact)
    model.parent.rename(model.parent.with_name("gone"))
    moved = artefact.rename(artefact.with_name("moved"))

    engine = backend.load(moved, threads=1)

    assert np.array_equal(engine.run({"x": batch})["y"], expected[0])
    assert [str(spec) for spec in engine.inputs] == ["float32[N, 64]"]
    assert [str(spec) for spec in engine.outputs] == ["float32[N, 48]"]
    assert engine.memory_bytes >= 4 * 64 * 128
    engine.close()


def test_weights_inside_branches_are_kept(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path
) -> None:
    def weights(name: str, seed: int) -> onnx.TensorProto:
        values = np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32)
        return numpy_helper.from_array(values, name)

    def branch(name: str, weight: str, own: list[onnx.TensorProto]) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph(
            [helper.make_node("MatMul", ["x", weight], [name])], name, [], [output], own
        )

    graph = helper.make_graph(
        [
            helper.make_node(
                "If",
                ["c"],
                ["y"],
                then_branch=branch("then", "inner", [weights("inner", 1)]),
                else_branch=branch("else", "outer", []),
            )
        ],
        "branches",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [weights("outer", 2)],
    )
    model = save_graph("model.onnx", graph, external=True)
    backend.compile(model, PROFILE, artefact)
    engine = backend.load(artefact, threads=1)
    for condition in (True, False):
        inputs = {"x": np.ones((2, 64), np.float32), "c": np.array(condition)}
        assert np.array_equal(engine.run(inputs)["y"], optimised_by_the_vendor(model, inputs)[0])


def test_a_model_that_lists_its_weights_as_inputs_asks_for_none_of_them(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path
) -> None:
    shapes = ("shape1", "shape2")  # equal: the optimiser keeps one of them
    nodes = [helper.make_node("ConstantOfShape", [shape], [f"of_{shape}"]) for shape in shapes]
    nodes.append(helper.make_node("MatMul", ["x", "of_shape1"], ["h"]))
    nodes.append(helper.make_node("MatMul", ["h", "of_shape2"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "old",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
            *[helper.make_tensor_value_info(shape, TensorProto.INT64, [2]) for shape in shapes],
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.array([4, 4]), shape) for shape in shapes],
    )
    backend.compile(save_graph("old.onnx", graph, ir_version=3), PROFILE, artefact)
    engine = backend.load(artefact, threads=1)
    assert [spec.name for spec in engine.inputs] == ["x"]
    assert engine.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 4)


def test_several_threads_run_one_engine_at_once(
    backend: OnnxRuntime, classifier: MakeModel, artefact: Path
) -> None:
    backend.compile(classifier(), PROFILE, artefact)
    engine = backend.load(artefact, threads=1)
    random = np.random.default_rng(3)
    batches = [random.standard_normal((1 + n % 8, 64), dtype=np.float32) for n in range(200)]
    alone = [engine.run({"x": batch})["y"] for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: engine.run({"x": batch})["y"], batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_outputs_belong_to_the_caller(
    backend: OnnxRuntime, classifier: MakeModel, artefact: Path, batch: np.ndarray
) -> None:
    backend.compile(classifier(), PROFILE, artefact)
    engine = backend.load(artefact, threads=1)
    first = engine.run({"x": batch})["y"]
    kept = first.copy()
    second = engine.run({"x": -batch})["y"]
    engine.close()
    assert np.array_equal(first, kept), "a later run and the end of the engine leave it alone"
    first[:] = 0
    assert second.any()


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x09"])
def test_what_is_no_model_is_an_invalid_model(
    backend: OnnxRuntime, tmp_path: Path, artefact: Path, content: bytes
) -> None:
    model = tmp_path / "broken.onnx"
    model.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"broken\.onnx") as refused:
        backend.compile(model, PROFILE, artefact)
    assert refused.value.code == "unusable_onnx"


def test_a_damaged_artefact_is_an_invalid_model(
    backend: OnnxRuntime, classifier: MakeModel, artefact: Path
) -> None:
    backend.compile(classifier(), PROFILE, artefact)
    os.truncate(artefact / "weights.bin", 100)
    with pytest.raises(InvalidModel):
        backend.load(artefact, threads=1)


def test_outputs_that_are_no_tensors_are_refused_when_compiled(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SequenceConstruct", ["x"], ["y"])], "g", [x], [y])
    with pytest.raises(InvalidModel, match=r"'y' is seq\(tensor\(float\)\)"):
        backend.compile(save_graph("sequence.onnx", graph), PROFILE, artefact)


def make_shape_engine(backend: OnnxRuntime, save_graph: MakeModel, artefact: Path, op: str):
    """`op(data, shape)`: what it takes and makes is only known when it runs."""
    inputs = [helper.make_tensor_value_info("shape", TensorProto.INT64, ["rank"])]
    arguments = ["shape"]
    if op == "Reshape":
        inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"]))
        arguments = ["x", "shape"]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(op, arguments, ["y"])], "g", inputs, [y])
    backend.compile(save_graph("model.onnx", graph), PROFILE, artefact)
    return backend.load(artefact, threads=1)


def test_a_run_that_the_model_cannot_do_fails_for_good(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = make_shape_engine(backend, save_graph, artefact, "Reshape")
    with pytest.raises(InferenceFailed, match=r"x': 'float32\[5\]'") as failed:
        engine.run({"x": np.ones(5, np.float32), "shape": np.array([2, 2])})
    assert failed.value.code == "engine_failed"
    assert capfd.readouterr() == ("", ""), "the vendor's library prints nothing of its own"
    assert engine.run({"x": np.ones(4, np.float32), "shape": np.array([2, 2])})["y"].shape == (2, 2)


def test_a_run_without_enough_memory_may_be_retried(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path
) -> None:
    engine = make_shape_engine(backend, save_graph, artefact, "ConstantOfShape")
    with pytest.raises(DeviceOutOfMemory, match="Expected enough memory for running a batch"):
        engine.run({"shape": np.array([1 << 45])})
    assert engine.run({"shape": np.array([3])})["y"].shape == (3,)


class FailingSession:
    """Stands for a session of the vendor's library that raises what it is given."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def get_inputs(self) -> list[object]:
        return []

    def get_outputs(self) -> list[object]:
        return []

    def run(self, *_: object) -> list[np.ndarray]:
        raise self._error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_running_out_of_memory_in_other_words_may_be_retried_too(error: Exception) -> None:
    with pytest.raises(DeviceOutOfMemory):
        OnnxRuntimeEngine(FailingSession(error), memory_bytes=0).run({})


def test_the_fingerprint_tells_this_machine() -> None:
    fingerprint = OnnxRuntime().fingerprint()
    assert fingerprint == OnnxRuntime().fingerprint()
    assert fingerprint["instruction_set"], "prepacked weights fit one instruction set only"
    assert fingerprint["architecture"]


def test_nothing_is_imported_before_a_model_needs_it_and_no_telemetry_ever(tmp_path: Path) -> None:
    script = """if True:
        import sys
        import pipelines.engines
        assert not {"onnxruntime", "onnx"} & sys.modules.keys()
        from pipelines.engines.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
        assert "onnxruntime" not in sys.modules
        OnnxRuntime()
        assert "onnxruntime" in sys.modules and "onnx" not in sys.modules
    """
    silent = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in silent}
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment | {"HOME": str(tmp_path)}
    )
    assert not list(tmp_path.rglob("*onnxruntime*")), "telemetry keeps its queue in the home folder"
