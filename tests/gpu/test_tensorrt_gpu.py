"""TensorRT on a GPU: its answers against ONNX Runtime and torch, its slots, graphs and limits."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from examples.models import efficientnet, minilm, whisper
from pipelines.bundle import Bundle
from pipelines.engines.cuda import open_cuda
from pipelines.engines.engine import DeviceOutOfMemory, Engine, Profile
from pipelines.engines.onnxruntime import OnnxRuntime
from pipelines.engines.precision import difference
from pipelines.engines.tensorrt import PLAN_FILE, TensorRT
from schemas.errors import InvalidModel, PipelineError
from schemas.models import ShapeRange
from tests.servers.process import NOT_TESTED

ROOT = Path(__file__).parents[2]
BUCKETS = (1, 2, 4, 8)
FEW = (1, 8)
"""Of large models: each bucket is built and timed by itself."""
LARGE = 1 << 17
"""Rows whose inputs take 32 MiB."""
FLOAT32 = 1e-4
"""How far answers may be from the CPU's (see `difference`): sums of float32 in another order, which between
two libraries on a CPU are 1e-6 off. With weights in TF32 EfficientNet is 3e-3 off and MiniLM 5e-4."""

Arrays = dict[str, np.ndarray]
Load = Callable[[Path], Engine]


def reference(model: Path, folder: Path, inputs: Arrays) -> Arrays:
    folder.mkdir()
    backend = OnnxRuntime()
    backend.compile(model, Profile(BUCKETS), folder)
    engine = backend.load(folder, threads=2)
    answer = engine.run(inputs)
    engine.close()
    return answer


def expect_agreement(came: Arrays, expected: Arrays, tolerance: float = FLOAT32) -> None:
    assert came.keys() == expected.keys()
    off = {name: difference(came[name], array) for name, array in expected.items()}
    assert max(off.values()) < tolerance, off


def save(folder: Path, graph: onnx.GraphProto) -> Path:
    opset = helper.make_opsetid("", 19)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), folder / "m.onnx")
    return folder / "m.onnx"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """x float32[N, 64] to y float32[N, 48]; its weights are in `weights`."""
    first, second = weights()
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    ends = [("x", 64), ("y", 48)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", size]) for n, size in ends)
    initial = [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")]
    return save(tmp_path, helper.make_graph(nodes, "classifier", [x], [y], initial))


def weights() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return (
        random.standard_normal((64, 128), dtype=np.float32),
        random.standard_normal((128, 48), dtype=np.float32),
    )


def rows(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 64), dtype=np.float32)


@pytest.fixture
def engine(backend: TensorRT, load: Load, classifier: Path, artefact: Path) -> Engine:
    backend.compile(classifier, Profile(BUCKETS), artefact)
    return load(artefact)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_batches_of_any_size_agree_with_onnx_runtime(
    engine: Engine, classifier: Path, tmp_path: Path, count: int
) -> None:
    inputs = {"x": rows(count)}
    expect_agreement(engine.run(inputs), reference(classifier, tmp_path / "ort", inputs))


@pytest.fixture
def torch() -> ModuleType:
    why = f"{NOT_TESTED} torch: it is not installed, or its libraries are not"
    return pytest.importorskip("torch", reason=why, exc_type=ImportError)


def test_answers_agree_with_torch(engine: Engine, torch: ModuleType) -> None:
    x, (first, second) = rows(8), map(torch.from_numpy, weights())
    expected = torch.relu(torch.from_numpy(x) @ first) @ second
    expect_agreement(engine.run({"x": x}), {"y": expected.numpy()})


def test_torch_and_the_engine_share_the_device_and_its_context(
    engine: Engine, torch: ModuleType
) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{NOT_TESTED} torch on the GPU: the one that is here has no CUDA")
    first = torch.from_numpy(weights()[0]).cuda()
    for seed in range(20):
        x = rows(8, seed)
        before = (torch.from_numpy(x).cuda() @ first).sum().item()
        y = engine.run({"x": x})["y"]
        assert np.array_equal(engine.run({"x": x})["y"], y)
        assert (torch.from_numpy(x).cuda() @ first).sum().item() == before


def test_photographs(backend: TensorRT, load: Load, artefact: Path, tmp_path: Path) -> None:
    efficientnet.build(tmp_path / "bundle")
    model = tmp_path / "bundle" / "model.onnx"
    backend.compile(model, Profile(FEW), artefact)
    images = np.random.default_rng(2).standard_normal((5, 3, 224, 224), dtype=np.float32)
    came = load(artefact).run({"images": images})
    expect_agreement(came, reference(model, tmp_path / "ort", {"images": images}))


def shapes_of(bundle: Path, role: str = "main") -> dict[str, ShapeRange]:
    return Bundle.open(bundle, check_graphs=False).config.engines[role].shapes


def test_sentences_of_any_length(
    backend: TensorRT, load: Load, artefact: Path, tmp_path: Path
) -> None:
    minilm.build_embedder(tmp_path / "bundle")
    model = tmp_path / "bundle" / "model.onnx"
    backend.compile(model, Profile(FEW, shapes_of(tmp_path / "bundle")), artefact)
    engine = load(artefact)
    for number, (count, length) in enumerate([(1, 1), (3, 17), (8, 256), (11, 5)]):
        ids = np.random.default_rng(number).integers(1000, 20_000, (count, length))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        expected = reference(model, tmp_path / f"ort{number}", inputs)
        expect_agreement(engine.run(inputs), expected)


def test_speech_from_nothing_said_on(backend: TensorRT, load: Load, tmp_path: Path) -> None:
    whisper.build(tmp_path / "bundle")
    engines = {}
    for role in ("encoder", "decoder"):
        folder = tmp_path / role
        folder.mkdir()
        model = tmp_path / "bundle" / f"{role}.onnx"
        backend.compile(model, Profile((1, 2), shapes_of(tmp_path / "bundle", role)), folder)
        engines[role] = load(folder), model
    waveform = np.random.default_rng(3).standard_normal((2, 480_000), dtype=np.float32) * 0.1
    encoder, model = engines["encoder"]
    heard = encoder.run({"waveform": waveform})
    loose = 1e-3  # its spectrogram has logarithms of what is nearly nothing
    expect_agreement(heard, reference(model, tmp_path / "e", {"waveform": waveform}), loose)
    decoder, model = engines["decoder"]
    said = np.zeros((2, 8, 6, 0, 64), np.float32)
    for number in range(3):
        inputs = {**heard, "token": np.full((2, 1), 50257), "past_kv": said}
        came = decoder.run(inputs)
        expect_agreement(came, reference(model, tmp_path / f"d{number}", inputs), loose)
        said = came["present_kv"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(TensorProto.FLOAT16, 2e-3), (TensorProto.BFLOAT16, 1.6e-2)],
    ids=["fp16", "bf16"],
)
def test_a_graph_that_was_cast_is_as_exact_as_its_type(
    backend: TensorRT, load: Load, artefact: Path, tmp_path: Path, dtype: int, tolerance: float
) -> None:
    first, _ = weights()
    nodes = [
        helper.make_node("Cast", ["x"], ["xc"], to=dtype),
        helper.make_node("Cast", ["w"], ["wc"], to=dtype),
        helper.make_node("MatMul", ["xc", "wc"], ["yc"]),
        helper.make_node("Cast", ["yc"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [("x", 64), ("y", 128)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", size]) for n, size in ends)
    graph = helper.make_graph(nodes, "cast", [x], [y], [numpy_helper.from_array(first, "w")])
    backend.compile(save(tmp_path, graph), Profile(BUCKETS), artefact)
    given = rows(8)
    off = difference(load(artefact).run({"x": given})["y"], given @ first)
    assert tolerance / 100 < off < tolerance, "rounded, and no more than that"


@pytest.mark.parametrize(
    ("dtype", "operator"),
    [
        pytest.param(TensorProto.FLOAT16, "Add", id="fp16"),
        pytest.param(TensorProto.INT32, "Add", id="int32"),
        pytest.param(TensorProto.INT64, "Add", id="int64"),
        pytest.param(TensorProto.BOOL, "Xor", id="bool"),
    ],
)
def test_each_type_of_input_and_output(
    backend: TensorRT, load: Load, artefact: Path, tmp_path: Path, dtype: int, operator: str
) -> None:
    """x[N, 5] and a scalar, in any layout: y of the same type."""
    shapes = {"x": ["N", 5], "one": [], "y": ["N", 5]}
    x, one, y = (helper.make_tensor_value_info(n, dtype, shape) for n, shape in shapes.items())
    node = helper.make_node(operator, ["x", "one"], ["y"])
    model = save(tmp_path, helper.make_graph([node], "types", [x, one], [y]))
    backend.compile(model, Profile(FEW), artefact)
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    wide = np.random.default_rng(0).integers(0, 2, (24, 10)).astype(numpy_type)
    inputs = {"x": wide[::-2, ::2], "one": np.ones((), numpy_type)}
    came = load(artefact).run(inputs)["y"]
    assert came.dtype == numpy_type
    expected = np.logical_xor if operator == "Xor" else np.add
    assert np.array_equal(came, expected(inputs["x"], inputs["one"]))


# ── slots, graphs, memory ───────────────────────────────────────────────────────────────────────


def test_many_threads_share_the_slots(engine: Engine) -> None:
    batches = [rows(1 + seed % 13, seed) for seed in range(400)]
    alone = [engine.run({"x": x})["y"] for x in batches]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda x: engine.run({"x": x})["y"], batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_graph_answers_what_the_plain_run_answers(
    backend: TensorRT, load: Load, classifier: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.compile(classifier, Profile(BUCKETS), artefact)
    with monkeypatch.context() as patched:
        context = "pipelines.engines.tensorrt_context.BucketContext._captured"
        patched.setattr(context, lambda self: None)
        plain = load(artefact)
    graphs = load(artefact)
    for slot in graphs._slots:  # type: ignore[attr-defined]
        assert all(made._graph for made in slot._contexts.values())
    for count in (1, 3, 8):
        x = {"x": rows(count)}
        assert np.array_equal(graphs.run(x)["y"], plain.run(x)["y"])


def test_an_engine_is_loaded_while_another_runs(engine: Engine, load: Load, artefact: Path) -> None:
    """One thread captures graphs and allocates while others put work on streams of their own."""
    x = rows(5)
    expected = engine.run({"x": x})["y"]
    ended = threading.Event()

    def run() -> bool:
        right = True
        while not ended.is_set():
            right &= np.array_equal(engine.run({"x": x})["y"], expected)
        return right

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(run) for _ in range(2)]
        try:
            for _ in range(5):
                assert np.array_equal(load(artefact).run({"x": x})["y"], expected)
        finally:
            ended.set()
    assert all(thread.result() for thread in running)


FAIL = """if True:
    import sys
    from pathlib import Path
    import numpy as np
    from pipelines.engines.cuda import open_cuda
    from schemas.errors import DEVICE_FAILED
    from pipelines.engines.tensorrt import TensorRT
    from pipelines.engines.tensorrt_context import BucketContext
    from schemas.errors import Transient
    from tests.gpu.trap import trap
    if sys.argv[3] == "plain":
        BucketContext._captured = lambda self: None
    backend, artefact, cuda = TensorRT(sys.argv[1]), Path(sys.argv[2]), open_cuda()
    engine = backend.load(artefact, threads=1)
    engine.run({"x": np.zeros((3, 64), np.float32)})
    with cuda.active():
        stream = cuda.new_stream()
        trap(stream)
    calls = [
        lambda: wait(stream),
        lambda: engine.run({"x": np.zeros((3, 64), np.float32)}),
        lambda: engine.run({"x": np.zeros((3, 64), np.float32)}),
        lambda: backend.load(artefact, threads=1),
    ]
    def wait(stream):
        with cuda.active():
            cuda.wait(stream)
    codes = []
    for call in calls:
        try:
            call()
        except Transient as error:
            codes.append(error.code)
    assert codes == [DEVICE_FAILED] * 4, codes
    engine.close()
    print("ended well")
"""


@pytest.mark.parametrize("by", ["graph", "plain"])
def test_a_device_that_failed_fails_no_job_and_no_model(
    backend: TensorRT, classifier: Path, artefact: Path, by: str
) -> None:
    """In a process of its own, because it stays so."""
    backend.compile(classifier, Profile(FEW), artefact)
    command = [sys.executable, "-c", FAIL, backend.name, str(artefact), by]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ended well" in done.stdout, done.stdout + done.stderr


def test_closing_gives_the_memory_back(backend: TensorRT, classifier: Path, artefact: Path) -> None:
    backend.compile(classifier, Profile((1, LARGE)), artefact)

    def load_and_close() -> int:
        engine = backend.load(artefact, threads=1)
        engine.run({"x": rows(LARGE + 1)})
        engine.close()
        return free_bytes()

    before = load_and_close()
    for _ in range(20):
        after = load_and_close()
    assert before - after < LARGE * 64 * 4, "less than one input of one slot"


def test_a_device_without_room_is_a_retryable_error(
    backend: TensorRT, load: Load, classifier: Path, artefact: Path
) -> None:
    backend.compile(classifier, Profile((LARGE,)), artefact)
    cuda = open_cuda()
    taken = []
    size = 1 << 36
    with cuda.active():
        while size >= 1 << 20:
            try:
                taken.append(cuda.allocate(size))
            except DeviceOutOfMemory:
                size //= 2
    try:
        with pytest.raises(DeviceOutOfMemory):
            backend.load(artefact, threads=1)
    finally:
        with cuda.active():
            for pointer in taken:
                cuda.free(pointer)
    engine = load(artefact)
    assert engine.run({"x": rows(3)})["y"].shape == (3, 48)


def free_bytes() -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with open_cuda().active():
        driver = ctypes.CDLL("libcuda.so.1")
        assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


# ── plans ───────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_for_another_gpu_is_refused(
    backend: TensorRT, classifier: Path, artefact: Path
) -> None:
    if backend.name != "tensorrt-rtx":
        pytest.skip("TensorRT builds for the GPU that is here alone")
    here = backend.fingerprint()["targets"]
    backend.for_target("sm75" if here != [75] else "sm89").compile(
        classifier, Profile(BUCKETS), artefact
    )
    assert backend.validity(artefact).verdict == "bad"
    with pytest.raises(InvalidModel, match="UNSUPPORTED_CC"):
        backend.load(artefact, threads=1)


def test_a_good_plan_is_valid(backend: TensorRT, classifier: Path, artefact: Path) -> None:
    backend.compile(classifier, Profile(BUCKETS), artefact)
    expected = "valid" if backend.name == "tensorrt-rtx" else "unknown"
    assert backend.validity(artefact).verdict == expected


@pytest.mark.parametrize("damage", ["truncated", "another file"])
def test_a_damaged_plan_is_refused(
    backend: TensorRT, classifier: Path, artefact: Path, damage: str
) -> None:
    backend.compile(classifier, Profile(BUCKETS), artefact)
    plan = artefact / PLAN_FILE
    content = plan.read_bytes()
    plan.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no plan" * 100)
    with pytest.raises(PipelineError):
        backend.load(artefact, threads=1)


def test_loading_takes_a_fraction_of_building(
    backend: TensorRT,
    artefact: Path,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reports both. Kernels that an earlier test timed are not timed again."""
    efficientnet.build(tmp_path / "bundle")
    began = time.perf_counter()
    backend.compile(tmp_path / "bundle" / "model.onnx", Profile(FEW), artefact)
    built = time.perf_counter()
    backend.load(artefact, threads=1).close()
    loaded = time.perf_counter()
    record_property("build_s", built - began)
    record_property("load_s", loaded - built)
    with capsys.disabled():
        print(f"\n{backend.name}: built in {built - began:.2f} s, loaded in {loaded - built:.2f} s")
    assert loaded - built < built - began
