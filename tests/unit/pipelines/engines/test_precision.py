"""Fewer bits than float32: only when asked for, only when proven, and part of the key."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.bundle import Bundle
from pipelines.engines import Engine, EngineCache, Engines
from pipelines.engines.build_log import shown
from pipelines.engines.onnxruntime import open_unchanged
from pipelines.engines.openvino import OpenVino
from pipelines.engines.precision import difference
from schemas.errors import InvalidModel, PipelineError
from schemas.models import Accuracy, EngineConfig, Precision
from tests.servers.process import unavailable

MakeModel = Callable[..., Path]
INT8: list[Precision] = ["int8", "int8-dynamic"]


@pytest.fixture
def model(classifier: MakeModel, batch: np.ndarray) -> Path:
    """x float32[N, 64] to y float32[N, 48], with samples beside it."""
    path = classifier()
    np.savez(path.parent / "samples.npz", x=batch)
    return path


def config(
    precision: Precision, tolerance: float = 0.05, samples: str = "samples.npz"
) -> EngineConfig:
    return EngineConfig("model.onnx", "onnxruntime", precision, Accuracy(samples, tolerance))


def load(model: Path, asked: EngineConfig, cache: EngineCache) -> Engine:
    return Engines(cache).obtain(model, asked, (1, 8)).load()


def kept(cache: EngineCache) -> int:
    return len(list((cache.root / "objects").glob("*/*")))


# ── what comes out ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", INT8)
def test_weights_take_a_quarter_and_answers_stay_within_what_was_allowed(
    model: Path, cache: EngineCache, batch: np.ndarray, precision: Precision
) -> None:
    engine = load(model, config(precision), cache)
    right = open_unchanged(model).run({"x": batch})["y"]
    assert 0 < difference(engine.run({"x": batch})["y"], right) < 0.05
    assert engine.memory_bytes < load(model, EngineConfig("model.onnx"), cache).memory_bytes / 2


def test_openvino_computes_in_the_same_eight_bits(
    model: Path, cache: EngineCache, batch: np.ndarray
) -> None:
    try:
        OpenVino()
    except PipelineError as error:
        unavailable("openvino", error.message, "pip install 'headrace[openvino]'")
    asked = config("int8")
    ours = load(model, asked, cache).run({"x": batch})["y"]
    other = EngineConfig(asked.file, "openvino", "int8", asked.accuracy)
    engine = load(model, other, cache)
    theirs = engine.run({"x": batch})["y"]
    assert 0 < difference(theirs, open_unchanged(model).run({"x": batch})["y"]) < 0.05
    assert difference(theirs, ours) < 0.02


def test_weights_in_another_file_are_quantised_too(
    classifier: MakeModel, cache: EngineCache, batch: np.ndarray
) -> None:
    model = classifier(external=True)
    np.savez(model.parent / "samples.npz", x=batch)
    assert load(model, config("int8"), cache).run({"x": batch})["y"].shape == (5, 48)


def test_a_builder_says_how_far_off_it_is(model: Path, cache: EngineCache) -> None:
    said: list[str] = []
    with shown(said.append):
        load(model, config("int8"), cache)
    [line] = [line for line in said if "precision_compared" in line]
    assert "output 'y' on sample " in line


@pytest.mark.parametrize("precision", INT8)
def test_what_is_needed_on_the_way_lies_in_the_caches_folder(
    model: Path,
    cache: EngineCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
) -> None:
    """It is as large as the model, and the cache clears away what a killed builder leaves."""
    used: list[Path] = []
    mkdtemp = tempfile.mkdtemp

    def note(*args: object, **options: object) -> str:
        used.append(Path(mkdtemp(*args, **options)))  # type: ignore[call-overload]
        return str(used[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", note)
    load(model, config(precision), cache)
    assert len(used) > 2, "the build's, ours, and those of the quantiser"
    assert all(path.is_relative_to(cache.root / "building") for path in used)
    assert list((cache.root / "building").iterdir()) == []
    assert tempfile.gettempdir() not in map(str, used)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", INT8)
def test_what_is_further_off_than_allowed_is_not_kept(
    model: Path, cache: EngineCache, precision: Precision
) -> None:
    with pytest.raises(InvalidModel, match=r"at most 1e-05 off float32, it is 0\.\d+ off") as lost:
        load(model, config(precision, tolerance=1e-5), cache)
    assert lost.value.code == "accuracy_lost"
    assert kept(cache) == 0


def test_one_sample_that_is_far_off_is_enough(
    save_graph: MakeModel, cache: EngineCache, batch: np.ndarray
) -> None:
    """In the range of the others there is nothing left of it; an average would not tell."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64]) for name in "xy"]
    weights = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
    model = save_graph("model.onnx", graph)
    samples = np.concatenate([batch] * 20)
    samples[57] *= 1e-4
    np.savez(model.parent / "samples.npz", x=samples)
    with pytest.raises(InvalidModel, match="it is 1 off in output 'y' on sample 57;"):
        load(model, config("int8"), cache)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("onnxruntime", "bfloat16"),
        ("onnxruntime-cuda", "int8"),
        ("openvino", "int8-dynamic"),
        ("tensorrt", "int8"),
        ("tensorrt-rtx", "bfloat16"),
    ],
)
def test_a_precision_that_a_backend_has_not_is_refused_in_the_line_that_asks_for_it(
    bundle_folder: Path, backend: str, precision: str
) -> None:
    expect_refusal(
        bundle_folder,
        f"backend: {backend},\n    precision: {precision}",
        "precision_unsupported",
        rf"model\.yaml:6: Expected precision float32.* got {precision};",
    )


def test_fewer_bits_without_proof_are_refused(bundle_folder: Path) -> None:
    expect_refusal(
        bundle_folder,
        "precision: int8",
        "precision_unproven",
        r"model\.yaml:5: Expected `accuracy:",
    )


@pytest.mark.parametrize(
    ("samples", "code"),
    [("none.npz", "model_file_missing"), ("../elsewhere.npz", "model_file_outside")],
)
def test_samples_are_part_of_the_bundle(bundle_folder: Path, samples: str, code: str) -> None:
    more = f"precision: int8,\n    accuracy: {{samples: {samples}, tolerance: 0.1}}"
    expect_refusal(bundle_folder, more, code, r"model\.yaml:6:")


def expect_refusal(folder: Path, more: str, code: str, message: str) -> None:
    path = folder / "model.yaml"
    path.write_text(path.read_text().replace("{file: model.onnx}", f"{{file: model.onnx, {more}}}"))
    with pytest.raises(InvalidModel, match=message) as refused:
        Bundle.open(folder)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"x": np.ones((0, 64), np.float32)},
        {"x": np.float32(1)},
        {"x": np.ones((2, 64), np.float32), "z": np.ones((3, 1), np.float32)},
        {"z": np.ones((2, 64), np.float32)},
        {"x": np.ones((2, 65), np.float32)},
        {"x": np.ones((2, 64))},
        {"x": np.array([{}, {}], object)},
    ],
    ids=["empty", "no rows", "no axis", "uneven", "unknown name", "wide", "float64", "pickled"],
)
@pytest.mark.parametrize("precision", INT8)
def test_samples_that_are_not_of_the_graph_are_refused(
    model: Path, cache: EngineCache, arrays: dict[str, np.ndarray], precision: Precision
) -> None:
    np.savez(model.parent / "samples.npz", **arrays)
    with pytest.raises(InvalidModel) as refused:
        load(model, config(precision), cache)
    assert refused.value.code in ("samples_invalid", "quantisation_failed")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY"])
def test_what_is_no_npz_is_refused(model: Path, cache: EngineCache, content: bytes) -> None:
    (model.parent / "samples.npz").write_bytes(content)
    with pytest.raises(InvalidModel) as refused:
        load(model, config("int8"), cache)
    assert refused.value.code == "samples_invalid"


def test_samples_that_are_gone_are_refused(model: Path, cache: EngineCache) -> None:
    with pytest.raises(InvalidModel, match=r"gone\.npz") as refused:
        load(model, config("int8", samples="gone.npz"), cache)
    assert refused.value.code == "samples_invalid"


def test_what_cannot_be_quantised_is_refused(
    save_graph: MakeModel, cache: EngineCache, batch: np.ndarray
) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64]) for name in "xy"]
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="my.own")
    model = save_graph("model.onnx", helper.make_graph([node], "g", ends[:1], ends[1:]))
    np.savez(model.parent / "samples.npz", x=batch)
    with pytest.raises(InvalidModel, match="Frobnicate") as refused:
        load(model, config("int8"), cache)
    assert refused.value.code == "quantisation_failed"


# ── the key ─────────────────────────────────────────────────────────────────────────────────────


def test_samples_and_tolerance_make_another_engine(
    model: Path, cache: EngineCache, batch: np.ndarray
) -> None:
    load(model, config("int8"), cache)
    load(model, config("int8"), cache)
    assert kept(cache) == 1
    load(model, config("int8", tolerance=0.04), cache)
    assert kept(cache) == 2, "what passed a wide tolerance has not passed a narrow one"
    np.savez(model.parent / "samples.npz", x=2 * batch)
    load(model, config("int8"), cache)
    assert kept(cache) == 3, "calibrated anew"
    load(model, config("int8-dynamic"), cache)
    load(model, EngineConfig("model.onnx"), cache)
    assert kept(cache) == 5


def test_float32_takes_the_graph_as_it_is(
    save_graph: MakeModel, cache: EngineCache, batch: np.ndarray
) -> None:
    """Where the bundle brings 8 bits itself, they stay."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64]) for name in "xy"]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
    zero = helper.make_tensor("zero", TensorProto.INT8, [], [0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale, zero])
    model = save_graph("model.onnx", graph)
    came = load(model, EngineConfig("model.onnx"), cache).run({"x": batch})["y"]
    assert np.allclose(came, np.clip(np.round(batch / np.float32(0.1)), -128, 127) * 0.1)
    assert [node.op_type for node in onnx.load(model).graph.node] == [n.op_type for n in nodes]


# ── the measure ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("came", "exact", "off"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([0.0, 1e-9], [0.0, 0.0], math.inf),
        ([3.0, math.nan], [3.0, 4.0], math.inf),
        ([3.0, 4.0], [3.0, math.inf], math.inf),
        ([3.0, 4.0, 0.0], [3.0, 4.0], math.inf),
        (["a"], ["a"], 0),
        (["a"], ["b"], math.inf),
    ],
)
def test_the_difference_is_a_part_of_the_length(
    came: list[object], exact: list[object], off: float
) -> None:
    kind = object if isinstance(exact[0], str) else np.float32
    assert difference(np.array(came, kind), np.array(exact, kind)) == pytest.approx(off)
