"""What every backend on the CPU must do, shown on graphs whose answers onnx's own evaluator knows.

The backends on GPUs are held to the same in tests/gpu.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pipelines.engines.engine import Backend, DeviceOutOfMemory, Engine, Profile
from pipelines.engines.onnxruntime import OnnxRuntime
from schemas.errors import InferenceFailed, InvalidModel, PipelineError
from tests.servers.process import unavailable

Arrays = dict[str, np.ndarray]
Build = Callable[..., Path]

PROFILE = Profile(buckets=(1, 8))
WORDS, WIDTH, CLASSES = 50, 32, 12
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
"""Sums of float32 in another order; outputs are around 1. In bfloat16 it would be 1e-2."""


@pytest.fixture(scope="session", params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "onnxruntime":
        return OnnxRuntime()
    from pipelines.engines.openvino import OpenVino

    try:
        return OpenVino()
    except PipelineError as error:
        unavailable("openvino", error.message, "pip install 'headrace[openvino]'")


@pytest.fixture
def save(tmp_path: Path) -> Build:
    """`save(nodes, inputs, outputs, weights)`; inputs and outputs as `x=(T.FLOAT, "N", 3)`."""

    def build(
        nodes: list[onnx.NodeProto],
        inputs: dict[str, tuple[object, ...]],
        outputs: dict[str, tuple[object, ...]],
        weights: Arrays | None = None,
    ) -> Path:
        ends = (
            [helper.make_tensor_value_info(name, kind, axes) for name, (kind, *axes) in end.items()]
            for end in (inputs, outputs)
        )
        held = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
        graph = helper.make_graph(nodes, "graph", *ends, held)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.own", 1)]
        path = tmp_path / "model" / "model.onnx"
        path.parent.mkdir()
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
        return path

    return build


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir()
    return folder


@pytest.fixture
def load(backend: Backend, artefact: Path) -> Iterator[Callable[[Path], Engine]]:
    engines = []

    def compile_and_load(model: Path, threads: int = 1) -> Engine:
        backend.compile(model, PROFILE, artefact)
        engines.append(backend.load(artefact, threads=threads))
        return engines[-1]

    yield compile_and_load
    for engine in engines:
        engine.close()


@pytest.fixture
def reader(save: Build) -> Path:
    """A reader of sentences in small: words int64[N, T] and mask bool[N, T] to the mean of the words'
    vectors, float32[N, 32], their scores float32[N, 12] and the best of them int64[N]."""
    random = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Gather", ["vectors", "words"], ["each"]),
        node("Cast", ["mask"], ["counts"], to=T.FLOAT),
        node("Unsqueeze", ["counts", "last"], ["weights"]),
        node("Mul", ["each", "weights"], ["masked"]),
        node("ReduceSum", ["masked", "second"], ["sum"], keepdims=0),
        node("ReduceSum", ["counts", "second"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["mean"]),
        node("MatMul", ["mean", "classes"], ["scores"]),
        node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
    ]
    return save(
        nodes,
        {"words": (T.INT64, "N", "T"), "mask": (T.BOOL, "N", "T")},
        {"scores": (T.FLOAT, "N", CLASSES), "mean": (T.FLOAT, "N", WIDTH), "best": (T.INT64, "N")},
        {
            "vectors": random.standard_normal((WORDS, WIDTH), dtype=np.float32),
            "classes": random.standard_normal((WIDTH, CLASSES), dtype=np.float32),
            "last": np.array([2]),
            "second": np.array([1]),
        },
    )


def sentences(rows: int, words: int, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    mask = random.random((rows, words)) < 0.7
    mask[:, 0] = True
    return {"words": random.integers(0, WORDS, (rows, words)), "mask": mask}


def expected(model: Path, inputs: Arrays) -> Arrays:
    evaluator = ReferenceEvaluator(str(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def expect_agreement(came: Arrays, right: Arrays, **tolerance: float) -> None:
    assert list(came) == list(right), "the graph's names in the graph's order"
    for name, array in right.items():
        assert (came[name].dtype, came[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(came[name], array, **(tolerance or FLOAT32), err_msg=name)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_batches_and_lengths_of_any_size_are_answered_rightly(
    load: Callable[..., Engine], reader: Path
) -> None:
    engine = load(reader)
    assert [str(spec) for spec in engine.inputs] == ["int64[N, N]", "bool[N, N]"]
    for rows, words in ((1, 1), (1, 7), (8, 7), (3, 40), (1, 7)):
        inputs = sentences(rows, words)
        expect_agreement(engine.run(inputs), expected(reader, inputs))


def test_a_run_may_use_several_threads(load: Callable[..., Engine], reader: Path) -> None:
    inputs = sentences(8, 40)
    expect_agreement(load(reader, threads=2).run(inputs), expected(reader, inputs))


@pytest.mark.parametrize("kind", [T.INT8, T.INT16, T.INT32, T.INT64, T.UINT8, T.UINT16, T.UINT32])
def test_integers_of_every_size_go_in_and_come_out(
    load: Callable[..., Engine], save: Build, kind: int
) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        helper.make_node("Cast", ["x"], ["as_float"], to=T.FLOAT),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    outputs = {"as_float": (T.FLOAT, "N", 3), "same": (kind, "N", 3)}
    model = save(nodes, {"x": (kind, "N", 3)}, outputs)
    most = min(np.iinfo(dtype).max, 2**31 - 1)
    inputs = {"x": np.array([[0, 1, most], [max(np.iinfo(dtype).min, -(2**31)), 5, 7]], dtype)}
    expect_agreement(load(model).run(inputs), expected(model, inputs))


def test_one_array_may_leave_under_several_names(load: Callable[..., Engine], save: Build) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["z"]),
        helper.make_node("Identity", ["z"], ["b"]),
        helper.make_node("Identity", ["z"], ["a"]),
        helper.make_node("Neg", ["z"], ["c"]),
    ]
    outputs = dict.fromkeys("bcza", (T.FLOAT, "N"))
    model = save(nodes, {"x": (T.FLOAT, "N"), "unused": (T.FLOAT, "N")}, outputs)
    inputs = {"unused": np.zeros(3, np.float32), "x": np.array([-1, 0, 2], np.float32)}
    expect_agreement(load(model).run(inputs), expected(model, inputs))


def test_inputs_may_lie_in_memory_in_any_way_and_stay_as_they_are(
    load: Callable[..., Engine], reader: Path
) -> None:
    plain = sentences(4, 10)
    engine = load(reader)
    right = engine.run(plain)
    words = np.asfortranarray(plain["words"])
    mask = np.ascontiguousarray(plain["mask"][::-1, ::-1])[::-1, ::-1]
    words.flags.writeable = mask.flags.writeable = False
    expect_agreement(engine.run({"words": words, "mask": mask}), right)
    assert np.array_equal(words, plain["words"])


def test_outputs_belong_to_the_caller(load: Callable[..., Engine], reader: Path) -> None:
    engine = load(reader)
    first = engine.run(sentences(4, 10))
    kept = {name: array.copy() for name, array in first.items()}
    second = engine.run(sentences(4, 10, seed=1))
    engine.close()
    expect_agreement(first, kept, atol=0)
    first["scores"][:] = 0
    assert second["scores"].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_run_one_engine_at_once(
    load: Callable[..., Engine], reader: Path, threads: int
) -> None:
    engine = load(reader, threads=threads)
    batches = [sentences(1 + n % 8, 1 + n % 5, seed=n) for n in range(200)]
    alone = [engine.run(batch) for batch in batches]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(engine.run, batches))
    for one, other in zip(alone, together, strict=True):
        expect_agreement(other, one)


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────


def test_an_artefact_needs_nothing_outside_it(
    backend: Backend, reader: Path, artefact: Path
) -> None:
    inputs = sentences(2, 5)
    right = expected(reader, inputs)
    backend.compile(reader, PROFILE, artefact)
    reader.parent.rename(reader.parent.with_name("gone"))
    moved = artefact.rename(artefact.with_name("moved"))
    expect_agreement(backend.load(moved, threads=1).run(inputs), right)


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x09"])
def test_what_is_no_model_is_an_invalid_model(
    backend: Backend, tmp_path: Path, artefact: Path, content: bytes, capfd: pytest.CaptureFixture
) -> None:
    model = tmp_path / "broken.onnx"
    model.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"broken\.onnx") as refused:
        backend.compile(model, PROFILE, artefact)
    assert refused.value.code == "unusable_onnx"
    assert capfd.readouterr() == ("", ""), "the vendor's library prints nothing of its own"


def test_an_operator_that_is_not_there_is_named_with_its_node(
    backend: Backend, save: Build, artefact: Path
) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="node7", domain="my.own")
    model = save([node], {"x": (T.FLOAT, "N")}, {"y": (T.FLOAT, "N")})
    with pytest.raises(InvalidModel, match="Frobnicate") as refused:
        backend.compile(model, PROFILE, artefact)
    assert refused.value.code == "unsupported_operator"
    assert "node7" in refused.value.message


def test_what_is_no_artefact_is_an_invalid_model(
    backend: Backend, reader: Path, artefact: Path
) -> None:
    backend.compile(reader, PROFILE, artefact)
    for path in artefact.iterdir():
        content = path.read_bytes()
        for wrong in (b"", b"garbage", bytes(4096), content[: len(content) // 2]):
            path.write_bytes(wrong)
            with pytest.raises(InvalidModel):
                backend.load(artefact, threads=1)
        os.unlink(path)
        with pytest.raises(InvalidModel):
            backend.load(artefact, threads=1)
        path.write_bytes(content)
    backend.load(artefact, threads=1).close()


@pytest.fixture
def product(save: Build) -> Path:
    """x float32[N, K] and w float32[K, M] to their product y, of inputs that may not fit each other."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = {"x": (T.FLOAT, "N", "K"), "w": (T.FLOAT, "K", "M")}
    return save([node], ends, {"y": (T.FLOAT, "N", "M")})


def factors(rows: int, columns: int, seed: int, *, fit: bool = True) -> Arrays:
    random = np.random.default_rng(seed)
    shapes = {"x": (rows, 3), "w": (3 if fit else 2, columns)}
    return {n: random.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_that_the_model_cannot_do_fails_for_good_and_alone(
    load: Callable[..., Engine], product: Path, threads: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """What follows has the shapes of the failed run in part, and those of the one before."""
    engine = load(product, threads)
    for seed, (rows, columns) in enumerate([(2, 4), (5, 4), (2, 4), (2, 4), (5, 7), (2, 4)]):
        inputs = factors(rows, columns, seed)
        np.testing.assert_allclose(engine.run(inputs)["y"], inputs["x"] @ inputs["w"], **FLOAT32)
        with pytest.raises(InferenceFailed, match=r"w': 'float32\[2, 4\]'") as failed:
            engine.run(factors(rows, 4, seed, fit=False))
        assert failed.value.code == "engine_failed"
    assert capfd.readouterr() == ("", ""), "the vendor's library prints nothing of its own"


def test_runs_that_fail_leave_those_beside_them_alone(
    load: Callable[..., Engine], product: Path
) -> None:
    engine = load(product)

    def agrees(seed: int) -> bool:
        fit = seed % 4 != 0
        inputs = factors(2 + seed % 3, 4 + seed % 2, seed, fit=fit)
        try:
            came = engine.run(inputs)["y"]
        except InferenceFailed:
            return not fit
        return fit and np.allclose(came, inputs["x"] @ inputs["w"], **FLOAT32)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, range(80)))


def test_a_run_without_enough_memory_may_be_retried(
    load: Callable[..., Engine], save: Build
) -> None:
    node = helper.make_node("ConstantOfShape", ["shape"], ["y"])
    engine = load(save([node], {"shape": (T.INT64, 2)}, {"y": (T.FLOAT, "a", "b")}))
    for _ in range(2):
        with pytest.raises(DeviceOutOfMemory, match="Expected enough memory for running a batch"):
            engine.run({"shape": np.array([1 << 20, 1 << 20])})
        assert engine.run({"shape": np.array([3, 2])})["y"].shape == (3, 2)
