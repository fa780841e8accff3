"""The CUDA provider as far as it goes without a GPU; with one, see tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.engines import EngineCache, Engines
from pipelines.engines.build_log import recorded
from pipelines.engines.engine import DeviceOutOfMemory, Profile
from pipelines.engines.onnxruntime import MODEL_FILE, OnnxRuntime, open_unchanged
from pipelines.engines.onnxruntime_cuda import CUDA, OnnxRuntimeCuda
from schemas.errors import DEVICE_FAILED, InferenceFailed, InvalidModel, PipelineError, Transient
from schemas.models import EngineConfig

MakeModel = Callable[..., Path]
CPU = "CPUExecutionProvider"
PROFILE = Profile((1, 8))


class FakeSession:
    """Computes on the CPU under the name of whichever providers started."""

    started: tuple[str, ...] = (CUDA, CPU)
    asked: list[object]
    made = onnxruntime.InferenceSession

    def __init__(self, model: str, options: object, **asked: object) -> None:
        FakeSession.asked = [asked["providers"], asked["enable_fallback"]]
        self._session = FakeSession.made(model, options, providers=[CPU])
        self.run = self._session.run
        self.get_inputs = self._session.get_inputs
        self.get_outputs = self._session.get_outputs

    def get_providers(self) -> list[str]:
        return list(self.started)


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as the package onnxruntime-gpu brings it."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so"))


@pytest.fixture
def artefact(tmp_path: Path, classifier: MakeModel) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir()
    OnnxRuntimeCuda().compile(classifier(external=True), PROFILE, folder)
    return folder


def test_an_operator_that_onnx_does_not_have_is_named_with_its_node(
    save_graph: MakeModel, tmp_path: Path
) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="node7")
    model = save_graph("odd.onnx", helper.make_graph([node], "g", ends[:1], ends[1:]))
    with pytest.raises(InvalidModel, match="Frobnicate 'node7' in odd") as refused:
        OnnxRuntimeCuda().compile(model, PROFILE, tmp_path)
    assert refused.value.code == "unsupported_operator"


def test_the_builders_log_says_what_was_written(classifier: MakeModel, tmp_path: Path) -> None:
    with recorded() as log:
        (tmp_path / "artefact").mkdir()
        OnnxRuntimeCuda().compile(classifier(), PROFILE, tmp_path / "artefact")
    assert "nodes=4 bytes=" in log()


def test_the_gpu_is_asked_for_first_in_full_float32_and_without_a_silent_way_back(
    cuda_build: None,
    artefact: Path,
    classifier: MakeModel,
    batch: np.ndarray,
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine = OnnxRuntimeCuda().load(artefact, threads=1)
    providers, fallback = FakeSession.asked
    assert isinstance(providers, list)
    assert [providers[0][0], providers[1]] == [CUDA, CPU]
    assert providers[0][1]["use_tf32"] == "0"
    assert fallback == 0
    right = open_unchanged(classifier(external=True)).run({"x": batch})
    assert np.array_equal(engine.run({"x": batch})["y"], right["y"])
    assert "libcudnn" not in capfd.readouterr().out, "it goes to the log"


def test_a_provider_that_does_not_start_is_no_gpu(
    cuda_build: None, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime goes on with the CPU then, which takes hundreds of times as long."""
    monkeypatch.setattr(FakeSession, "started", (CPU,))
    with pytest.raises(PipelineError, match="an NVIDIA GPU with its driver") as missing:
        OnnxRuntimeCuda().load(artefact, threads=1)
    assert missing.value.code == "device_missing"


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this is the CUDA build")
def test_without_the_cuda_build_the_package_is_named(artefact: Path) -> None:
    with pytest.raises(PipelineError, match="install `onnxruntime-gpu` in the place of") as missing:
        OnnxRuntimeCuda().load(artefact, threads=1)
    assert missing.value.code == "backend_missing"


@pytest.mark.parametrize(
    ("says", "expected", "code"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", DeviceOutOfMemory, "device_out_of_memory"),
        ("CUBLAS_STATUS_ALLOC_FAILED", DeviceOutOfMemory, "device_out_of_memory"),
        ("CUDA failure 100: no CUDA-capable device is detected", PipelineError, "device_missing"),
        ("CUDA failure 719: unspecified launch failure", Transient, DEVICE_FAILED),
        ("Protobuf parsing failed", InvalidModel, "unusable_onnx"),
    ],
)
def test_what_the_library_says_is_told_apart(
    cuda_build: None,
    artefact: Path,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    expected: type[PipelineError],
    code: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(expected) as refused:
        OnnxRuntimeCuda().load(artefact, threads=1)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("says", "expected", "code"),
    [
        ("CUDA failure 700: an illegal memory access was encountered", Transient, DEVICE_FAILED),
        ("CUDA failure 719: unspecified launch failure", Transient, DEVICE_FAILED),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED", Transient, DEVICE_FAILED),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED", Transient, DEVICE_FAILED),
        ("CUDA failure 2: out of memory", DeviceOutOfMemory, "device_out_of_memory"),
        ("CUDA failure 1: invalid argument", InferenceFailed, "engine_failed"),
        ("CUDNN failure 3: CUDNN_STATUS_BAD_PARAM", InferenceFailed, "engine_failed"),
        ("Non-zero status code while running Gather node", InferenceFailed, "engine_failed"),
    ],
)
def test_a_run_that_fails_is_the_batchs_fault_or_the_devices(
    cuda_build: None,
    artefact: Path,
    batch: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    expected: type[PipelineError],
    code: str,
) -> None:
    """After an illegal access each later run fails alike: its jobs must not be failed for it."""

    def fail(*_: object) -> None:
        raise RuntimeError(says)

    engine = OnnxRuntimeCuda().load(artefact, threads=1)
    monkeypatch.setattr(engine._session, "run", fail)  # type: ignore[attr-defined]
    with pytest.raises(expected) as failed:
        engine.run({"x": batch})
    assert failed.value.code == code


def test_an_operator_that_is_not_there_is_named_with_its_node(
    cuda_build: None, tmp_path: Path
) -> None:
    """When it is loaded: which there are, the library on the machine with the GPU tells."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="/head/odd", domain="acme")
    graph = helper.make_graph([node], "odd", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "odd.onnx")
    OnnxRuntimeCuda().compile(tmp_path / "odd.onnx", PROFILE, tmp_path)
    with pytest.raises(InvalidModel, match="Frobnicate '/head/odd'") as refused:
        OnnxRuntimeCuda().load(tmp_path, threads=1)
    assert refused.value.code == "unsupported_operator"


def test_an_artefact_is_the_graph_as_it_is_in_one_folder(
    classifier: MakeModel, artefact: Path, batch: np.ndarray
) -> None:
    right = open_unchanged(classifier(external=True)).run({"x": batch})["y"]
    (artefact.parent / "model").rename(artefact.parent / "gone")
    assert sorted(path.name for path in artefact.iterdir()) == ["model.onnx", "weights.bin"]
    assert np.array_equal(open_unchanged(artefact / MODEL_FILE).run({"x": batch})["y"], right)


def test_half_precision_stays_in_the_graph(save_graph: MakeModel, tmp_path: Path) -> None:
    """What is optimised for the CPU casts it to float32."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["N", 64]) for n in "xy"]
    weights = numpy_helper.from_array(np.ones((64, 64), np.float16), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "half", ends[:1], ends[1:], [weights])
    model = save_graph("half.onnx", graph)
    operators = {}
    for backend in (OnnxRuntimeCuda(), OnnxRuntime()):
        folder = tmp_path / backend.name
        folder.mkdir()
        backend.compile(model, PROFILE, folder)
        operators[backend.name] = [
            n.op_type for n in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node
        ]
    assert operators["onnxruntime-cuda"] == ["MatMul"]
    assert "Cast" in operators["onnxruntime"], "so the artefact of one is of no use to the other"


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x09"])
def test_what_is_no_model_is_an_invalid_model(tmp_path: Path, content: bytes) -> None:
    model = tmp_path / "broken.onnx"
    model.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"broken\.onnx") as refused:
        OnnxRuntimeCuda().compile(model, PROFILE, tmp_path)
    assert refused.value.code == "unusable_onnx"


def test_it_is_taken_when_it_is_asked_for_and_kept_apart_from_the_cpu(
    cuda_build: None, classifier: MakeModel, cache: EngineCache, batch: np.ndarray
) -> None:
    model = classifier()
    for backend, providers in (("onnxruntime", [CPU]), ("onnxruntime-cuda", None)):
        Engines(cache).obtain(model, EngineConfig("model.onnx", backend), (1,)).load().close()
        assert providers is None or FakeSession.asked[0] == providers
    assert len(list((cache.root / "objects").glob("*/*"))) == 2


def test_the_fingerprint_names_no_device() -> None:
    assert OnnxRuntimeCuda().fingerprint().keys() == {"os", "architecture"}
