"""What is OpenVINO's own; what every backend must do is in tests/contract/test_engines.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper

from pipelines.engines import EngineCache, Engines
from pipelines.engines.build_log import recorded
from pipelines.engines.engine import Engine, Profile
from pipelines.engines.onnxruntime import open_unchanged
from pipelines.engines.openvino import BLOB_FILE, OpenVino
from pipelines.engines.precision import difference
from schemas.errors import InferenceFailed, InvalidModel, PipelineError
from schemas.models import EngineConfig, Precision
from tests.servers.process import unavailable

Arrays = dict[str, np.ndarray]
MakeModel = Callable[..., Path]
Load = Callable[..., Engine]
DemoBundle = Callable[[str], Path]


@pytest.fixture(scope="module")
def backend() -> OpenVino:
    try:
        return OpenVino()
    except PipelineError as error:
        unavailable("openvino", error.message, "pip install 'headrace[openvino]'")


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir()
    return folder


@pytest.fixture
def load(backend: OpenVino, tmp_path: Path) -> Load:
    def compile_and_load(model: Path, precision: Precision = "float32") -> Engine:
        folder = tmp_path / f"{model.stem}-{precision}"
        folder.mkdir()
        backend.compile(model, Profile((1, 2), precision=precision), folder)
        return backend.load(folder, threads=1)

    return compile_and_load


@pytest.fixture
def has_bfloat16(backend: OpenVino) -> None:
    if "BF16" not in backend._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")


def graph_of(op: str, kind: int, shape: list[int | str] | None, **attributes: object) -> object:
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", attributes.get("to", kind), shape)
    return helper.make_graph([helper.make_node(op, ["x"], ["y"], **attributes)], "g", [x], [y])


# ── the demo's models ───────────────────────────────────────────────────────────────────────────


FLOAT32 = 1e-5
"""How far answers may be from ONNX Runtime's (see `difference`): sums of float32 in another order."""


def distance(engine: Engine, model: Path, *batches: Arrays) -> float:
    """From ONNX Runtime's answers; that of the worst output."""
    exact = open_unchanged(model)
    worst = 0.0
    for inputs in batches:
        came, right = engine.run(inputs), exact.run(inputs)
        assert list(came) == list(right)
        worst = max(worst, *(difference(came[name], right[name]) for name in right))
    return worst


def test_photographs_are_classified_alike(load: Load, demo_bundle: DemoBundle) -> None:
    model = demo_bundle("efficientnet-lite0") / "model.onnx"
    random = np.random.default_rng(0)
    images = random.standard_normal((2, 3, 224, 224), dtype=np.float32)
    assert distance(load(model), model, {"images": images}) < FLOAT32


def test_sentences_of_different_length_are_read_alike(load: Load, demo_bundle: DemoBundle) -> None:
    def sentences(rows: int, words: int) -> Arrays:
        ids = np.random.default_rng(0).integers(1000, 30000, (rows, words))
        mask = np.ones_like(ids)
        mask[-1, 4:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    model = demo_bundle("minilm-embed") / "model.onnx"
    assert distance(load(model), model, sentences(2, 13), sentences(1, 5)) < FLOAT32


def test_speech_is_heard_alike(load: Load, demo_bundle: DemoBundle) -> None:
    model = demo_bundle("whisper-tiny-en") / "encoder.onnx"
    waveform = np.random.default_rng(0).standard_normal((1, 480_000), dtype=np.float32) / 10
    assert distance(load(model), model, {"waveform": waveform}) < FLOAT32


def test_speech_is_written_alike(load: Load, demo_bundle: DemoBundle) -> None:
    """Of any sound, after none and some tokens."""
    random = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    sound = {f"cross_k_{layer}": floats(1, 6, 64, 1500) for layer in range(4)}
    sound |= {f"cross_v_{layer}": floats(1, 6, 1500, 64) for layer in range(4)}
    batches = [
        {**sound, "token": np.array([[50257]]), "past_kv": floats(1, 8, 6, spoken, 64)}
        for spoken in (0, 6)
    ]
    model = demo_bundle("whisper-tiny-en") / "decoder.onnx"
    assert distance(load(model), model, *batches) < FLOAT32


def test_bfloat16_is_computed_only_where_it_is_asked_for(
    load: Load, classifier: MakeModel, batch: np.ndarray, has_bfloat16: None
) -> None:
    model = classifier()
    assert distance(load(model), model, {"x": batch}) < 1e-6
    assert 1e-4 < distance(load(model, "bfloat16"), model, {"x": batch}) < 1e-2


# ── what OpenVINO does not do as the graph says ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "shape", "code", "message"),
    [
        (TensorProto.DOUBLE, ["N", 3], "unsupported_tensor_type", "compute it in float32"),
        (TensorProto.STRING, ["N", 3], "unsupported_tensor_type", "'x' is string"),
        (TensorProto.FLOAT, None, "engine_build_failed", "dynamic rank"),
    ],
)
def test_what_it_would_do_wrongly_is_refused_when_compiled(
    load: Load,
    save_graph: MakeModel,
    kind: int,
    shape: list[int | str] | None,
    code: str,
    message: str,
) -> None:
    with pytest.raises(InvalidModel, match=message) as refused:
        load(save_graph("model.onnx", graph_of("Identity", kind, shape)))
    assert refused.value.code == code


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_integers_that_it_would_cut_off_are_refused(
    load: Load, save_graph: MakeModel, value: int
) -> None:
    graph = graph_of("Abs", TensorProto.INT64, ["N"])
    engine = load(save_graph("model.onnx", graph))
    with pytest.raises(InferenceFailed, match=f"{value}.* use the backend onnxruntime"):
        engine.run({"x": np.array([0, value])})
    assert engine.run({"x": np.array([0, 2**31 - 1])})["y"].tolist() == [0, 2**31 - 1]


def test_a_failed_run_in_bfloat16_leaves_the_next_one_alone(
    load: Load, save_graph: MakeModel, has_bfloat16: None
) -> None:
    """Without loading it anew, OpenVINO goes on failing."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)
        for name, axes in (("x", ["N", "K"]), ("w", ["K", "M"]), ("y", ["N", "M"]))
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", ends[:2], ends[2:])
    engine = load(save_graph("model.onnx", graph), "bfloat16")
    x, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    for _ in range(3):
        assert (engine.run({"x": x, "w": w})["y"] == 3).all()
        with pytest.raises(InferenceFailed):
            engine.run({"x": x, "w": w[:2]})


def test_a_cpu_without_bfloat16_is_refused_not_slow(
    backend: OpenVino, classifier: MakeModel, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setattr(backend, "_core", old)
    with pytest.raises(InvalidModel, match="this one does not") as refused:
        backend.compile(classifier(), Profile((1,), precision="bfloat16"), artefact)
    assert refused.value.code == "precision_unsupported"


# ── the artefact ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", [b";ov=2026", b";isa=Intel"])
def test_an_artefact_of_another_version_or_cpu_is_refused(
    backend: OpenVino, classifier: MakeModel, artefact: Path, part: bytes
) -> None:
    backend.compile(classifier(), Profile((1,)), artefact)
    blob = (artefact / BLOB_FILE).read_bytes()
    assert part in blob
    (artefact / BLOB_FILE).write_bytes(blob.replace(part, part[:-1] + b"?"))
    with pytest.raises(InvalidModel) as refused:
        backend.load(artefact, threads=1)
    assert refused.value.code == "engine_unusable"


def test_changed_weights_change_the_answers_though_path_size_and_time_stay(
    backend: OpenVino, classifier: MakeModel, cache: EngineCache, batch: np.ndarray
) -> None:
    """OpenVINO's own cache would answer with the old ones."""
    config = EngineConfig("model.onnx", "openvino")
    answers, seen = [], set()
    for seed in (0, 1):
        model = classifier(seed=seed)
        os.utime(model, ns=(10**18, 10**18))
        seen.add((model.stat().st_size, model.stat().st_mtime_ns))
        engine = Engines(cache).obtain(model, config, (1, 8)).load()
        answers.append(engine.run({"x": batch})["y"])
        engine.close()
    assert len(seen) == 1
    assert not np.allclose(*answers)


def test_the_fingerprint_tells_this_cpu(backend: OpenVino) -> None:
    fingerprint = backend.fingerprint()
    assert fingerprint["instruction_set"]
    assert fingerprint["architecture"]


def test_memory_is_that_of_the_weights_twice(load: Load, classifier: MakeModel) -> None:
    weights_bytes = 4 * (64 * 128 + 128 * 48)
    assert 2 * weights_bytes < load(classifier()).memory_bytes < 3 * weights_bytes


def test_the_builders_log_says_what_became_of_the_graph(
    backend: OpenVino, classifier: MakeModel, artefact: Path
) -> None:
    with recorded() as log:
        backend.compile(classifier(), Profile((1,)), artefact)
    [line] = log().splitlines()
    written = sum(path.stat().st_size for path in artefact.iterdir())
    assert re.search(rf"nodes=\d+ optimised_nodes=\d+ bytes={written} seconds=", line)


# ── the library ─────────────────────────────────────────────────────────────────────────────────


def test_it_is_imported_for_the_first_model_and_tells_nobody(
    backend: OpenVino, tmp_path: Path
) -> None:
    script = """if True:
        import sys
        import pipelines.engines
        from pipelines.engines.openvino import OpenVino
        assert "openvino" not in sys.modules
        OpenVino()
        assert "openvino" in sys.modules
        assert not {"onnxruntime", "onnx", "openvino_telemetry"} & sys.modules.keys()
        assert "openvino.tools.ovc" not in sys.modules
    """
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment | {"HOME": str(tmp_path)}
    )
    assert not list(tmp_path.iterdir()), "its telemetry keeps an identity in the home folder"


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PipelineError, match=r"install 'headrace\[openvino\]'") as missing:
        OpenVino()
    assert missing.value.code == "backend_missing"
