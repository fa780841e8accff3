"""What is ONNX Runtime's own; what every backend must do is in tests/contract/test_engines.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.engines import EngineCache, Engines
from pipelines.engines.engine import DeviceOutOfMemory, Profile
from pipelines.engines.manifest import check
from pipelines.engines.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from schemas.errors import InvalidModel
from schemas.models import EngineConfig

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


def test_outputs_that_are_no_tensors_are_refused_when_compiled(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SequenceConstruct", ["x"], ["y"])], "g", [x], [y])
    with pytest.raises(InvalidModel, match=r"'y' is seq\(tensor\(float\)\)"):
        backend.compile(save_graph("sequence.onnx", graph), PROFILE, artefact)


@pytest.mark.parametrize(
    ("operator", "says"),
    [("Frobnicate", "No Op registered for"), ("Upsample", "is deprecated")],
    ids=["unknown", "gone from the opset"],
)
def test_an_operator_that_onnx_does_not_have_is_named_with_its_node_alone(
    backend: OnnxRuntime, save_graph: MakeModel, artefact: Path, operator: str, says: str
) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="other"),
        helper.make_node(operator, ["h"], ["y"], name="/head/Relu"),
    ]
    model = save_graph("Relu/odd.onnx", helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    with pytest.raises(InvalidModel, match=f"of {operator} '/head/Relu'.* in odd") as refused:
        backend.compile(model, PROFILE, artefact)
    assert refused.value.code == "unsupported_operator"
    assert says in refused.value.message
    assert "other" not in refused.value.message.partition(" in odd")[0]


def test_the_builders_log_says_what_became_of_the_graph(
    classifier: MakeModel, cache: EngineCache
) -> None:
    """At whatever level the process logs."""
    artefact = Engines(cache).obtain(classifier(), EngineConfig("model.onnx"), (1,)).artefact
    entry = artefact.path.parent
    [line] = check(entry, entry.name, cache.keyring).build.log.splitlines()
    written = sum(path.stat().st_size for path in artefact.path.iterdir())
    assert re.search(rf"nodes=4 optimised_nodes=[1-4] bytes={written} seconds=", line)


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
