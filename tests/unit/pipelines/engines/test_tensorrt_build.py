"""Plans that TensorRT-RTX really builds, on a machine without a GPU, for GPUs that it is told."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import TensorProto, helper, numpy_helper

from infra.objects.files import FileObjects
from infra.settings import EngineSettings, Settings, TensorRTSettings
from pipelines.bundle import Bundle
from pipelines.engines import open_engines, tensorrt_build
from pipelines.engines.build_log import recorded
from pipelines.engines.cuda import open_cuda
from pipelines.engines.engine import Profile
from pipelines.engines.tensorrt import PLAN_FILE, TensorRT
from pipelines.engines.tensorrt_library import import_library
from pipelines.engines.tensorrt_load import Validity
from schemas.errors import InvalidModel, PipelineError
from schemas.models import EngineConfig, ShapeRange
from tests.servers.process import NOT_TESTED

MakeModel = Callable[..., Path]
Compile = Callable[..., bytes]
DemoBundle = Callable[[str], Path]

BUCKETS = (1, 8)
LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
"""Models of the onnx package, their weights constants. Their batch is fixed."""

LONG = os.environ.get("HEADRACE_FAULTS") == "long"
"""A plan of every model for each GPU, which takes minutes. Otherwise one plan of each for all of them, which takes
no longer than for one."""

TARGETS = ["sm80", "sm86", "sm89", "sm120"]
ALL_TARGETS = ",".join(TARGETS)
LIGHT_MODELS = sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("*.onnx"))
DEMO_MODELS = [
    ("efficientnet-lite0", "main"),
    ("whisper-tiny-en", "encoder"),
    ("whisper-tiny-en", "decoder"),
    ("minilm-embed", "main"),
]
if LONG:
    LIGHT_CASES = list(itertools.product(LIGHT_MODELS, TARGETS))
    DEMO_TARGETS = TARGETS
else:
    LIGHT_CASES = [("zfnet512", target) for target in TARGETS]
    LIGHT_CASES += [(name, ALL_TARGETS) for name in LIGHT_MODELS if name != "densenet121"]  # 7 s
    DEMO_TARGETS = [ALL_TARGETS]

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip(
        f"{NOT_TESTED} TensorRT-RTX: it is not installed. To test it: pip install "
        "'headrace[tensorrt-rtx]', on Linux with an x86-64 processor",
        allow_module_level=True,
    )


def _has_gpu() -> bool:
    try:
        open_cuda()
    except PipelineError:
        return False
    return True


no_gpu = pytest.mark.skipif(_has_gpu(), reason="is about machines without a GPU")


@pytest.fixture
def compile_(tmp_path: Path) -> Compile:
    """`compile_(model, "sm89", buckets, x=ShapeRange(...))`: the plan's bytes."""

    def compile_(
        model: Path,
        target: str = "sm89",
        buckets: tuple[int, ...] = BUCKETS,
        **ranges: ShapeRange,
    ) -> bytes:
        folder = tmp_path / "artefact"
        folder.mkdir(exist_ok=True)
        backend = TensorRT("tensorrt-rtx").for_target(target)
        backend.compile(model, Profile(buckets, ranges), folder)
        assert [path.name for path in folder.iterdir()] == [PLAN_FILE]
        if not _has_gpu():
            assert backend.validity(folder) == Validity("unknown"), (
                "good, for all that is known here"
            )
        return (folder / PLAN_FILE).read_bytes()

    return compile_


def expect_a_plan(plan: bytes) -> None:
    """As far as its header tells: what it is, how long, and of which version."""
    import tensorrt_rtx

    runtime = tensorrt_rtx.Runtime(import_library("tensorrt-rtx").logger)
    header = plan[: runtime.engine_header_size]
    assert header[1:4] == b"trt"
    assert int.from_bytes(header[16:24], "little") == len(plan)
    assert ".".join(map(str, header[24:28])) == tensorrt_rtx.__version__


# ── models ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "target"), LIGHT_CASES)
def test_light_models_are_built(compile_: Compile, name: str, target: str) -> None:
    expect_a_plan(compile_(LIGHT / f"light_{name}.onnx", target))


@pytest.mark.parametrize("target", DEMO_TARGETS)
@pytest.mark.parametrize(("bundle", "role"), DEMO_MODELS)
def test_the_demos_models_are_built_as_their_model_yaml_says(
    compile_: Compile, demo_bundle: DemoBundle, bundle: str, role: str, target: str
) -> None:
    opened = Bundle.open(demo_bundle(bundle), check_graphs=False)
    config, buckets = opened.config.engines[role], opened.config.batch.buckets
    model = opened.path(config.file)
    plan = compile_(model, target, buckets, **config.shapes)
    expect_a_plan(plan)
    assert len(plan) > model.stat().st_size, "holds its weights"


# ── precision, shapes, targets ──────────────────────────────────────────────────────────────────


def _linear(dtype: int, *, quantised: bool = False) -> onnx.GraphProto:
    """x float32[N, 64] to y float32[N, 32]; in between the graph's own precision."""
    weights = numpy_helper.from_array(np.ones((64, 32), np.float32), "w")
    nodes, initial = [], [weights]
    for name in ("x", "w"):
        if quantised:
            zero = helper.make_tensor(f"{name}_zero", dtype, [], [0])
            initial += [numpy_helper.from_array(np.float32(0.1), f"{name}_scale"), zero]
            given = [f"{name}_scale", f"{name}_zero"]
            nodes += [
                helper.make_node("QuantizeLinear", [name, *given], [f"{name}_q"]),
                helper.make_node("DequantizeLinear", [f"{name}_q", *given], [f"{name}_in"]),
            ]
        else:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_in"], to=dtype))
    nodes.append(helper.make_node("MatMul", ["x_in", "w_in"], ["h"]))
    nodes.append(helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT))
    ends = [("x", 64), ("y", 32)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", size]) for n, size in ends)
    return helper.make_graph(nodes, "linear", [x], [y], initial)


@pytest.mark.parametrize(
    ("dtype", "quantised"),
    [
        (TensorProto.FLOAT16, False),
        (TensorProto.BFLOAT16, False),
        (TensorProto.INT8, True),
        (TensorProto.FLOAT8E4M3FN, True),
    ],
    ids=["fp16", "bf16", "int8", "fp8"],
)
def test_precision_is_what_the_graph_says(
    compile_: Compile, save_graph: MakeModel, dtype: int, quantised: bool
) -> None:
    graph = _linear(dtype, quantised=quantised)
    model = onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    path = save_graph("model.onnx", graph)
    onnx.save(model, path)
    expect_a_plan(compile_(path, "sm89"))


def test_external_weights_are_found_and_are_in_the_plan(
    compile_: Compile, classifier: MakeModel
) -> None:
    model = classifier(external=True)
    before = compile_(model)
    assert compile_(model) == before, "the same model gives the same bytes"
    classifier(external=True, seed=1)
    assert compile_(model) != before


def test_one_plan_for_several_gpus_and_one_profile_for_each_bucket(
    compile_: Compile, classifier: MakeModel
) -> None:
    model = classifier()
    one = compile_(model, "sm89", (8,))
    assert len(compile_(model, "sm80,sm89", (8,))) > len(one)
    assert compile_(model, "sm89", (4,)) != one
    expect_a_plan(compile_(model, "sm89", (1, 2, 4, 8, 16, 32)))


def test_the_library_has_taken_a_profile_for_each_bucket_and_the_gpus(
    classifier: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(tensorrt_build, "_use_timings", lambda config, _: configs.append(config))
    backend = TensorRT("tensorrt-rtx", TensorRTSettings(workspace_bytes=1 << 28))
    backend.for_target("sm80,sm89").compile(classifier(), Profile((1, 2, 8)), tmp_path)
    [config] = configs
    assert config.num_optimization_profiles == 3
    assert config.num_compute_capabilities == 2
    trt = backend._library.trt
    assert not config.get_flag(trt.BuilderFlag.TF32), "float32 is not rounded"
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28


def test_gpus_of_the_settings_are_those_of_the_command_line(
    classifier: MakeModel, tmp_path: Path
) -> None:
    """And their engines are the same."""
    options = EngineSettings(cache_dir=tmp_path / "cache", tensorrt={"target": "sm89,sm80"})
    objects = FileObjects(tmp_path / "objects")
    engines = open_engines(Settings(data_dir=tmp_path, engines=options), objects)
    config = EngineConfig("model.onnx", "tensorrt-rtx")
    keys = []
    for target in (None, "sm80,sm89", "sm89"):
        artefact = engines.obtain(classifier(), config, (1,), target=target).artefact
        artefact.release()
        keys.append(artefact.trace.key)
    assert keys[0] == keys[1] != keys[2]


def test_the_builders_log_is_short_and_has_figures(
    compile_: Compile, classifier: MakeModel
) -> None:
    with recorded() as log:
        plan = compile_(classifier())
    assert 5 < len(log().splitlines()) < 100
    assert "Engine generation completed in" in log()
    assert "profiles=2" in log()
    assert f"buckets=(1, 8) targets=(89,) bytes={len(plan)} seconds=" in log()


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


def _floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def refused(compile_: Compile, model: Path, **more: Any) -> InvalidModel:
    with pytest.raises(InvalidModel) as refusal:
        compile_(model, **more)
    return refusal.value


def test_every_unsupported_operator_is_named_with_its_node(
    compile_: Compile, save_graph: MakeModel
) -> None:
    nodes = [
        helper.make_node("Unique", ["x"], ["u"], name="/head/unique"),
        helper.make_node("Frobnicate", ["u"], ["y"], name="/head/odd", domain="acme"),
    ]
    graph = helper.make_graph(nodes, "odd", [_floats("x", "N")], [_floats("y", "N")])
    path = save_graph("odd.onnx", graph)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    error = refused(compile_, path)
    assert error.code == "unsupported_operator"
    assert "operator Unique of node '/head/unique'" in error.message
    assert "operator Frobnicate of node '/head/odd'" in error.message
    assert "odd.onnx" in error.message


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x09"])
def test_what_is_no_model_is_an_invalid_model(
    compile_: Compile, tmp_path: Path, content: bytes
) -> None:
    model = tmp_path / "broken.onnx"
    model.write_bytes(content)
    error = refused(compile_, model)
    assert error.code == "unusable_onnx"
    assert "broken.onnx" in error.message


@pytest.fixture
def sentences(save_graph: MakeModel) -> Path:
    """ids float32[N, S, 4] to y, the same."""
    ends = [_floats(name, "N", "S", 4) for name in ("ids", "y")]
    node = helper.make_node("Relu", ["ids"], ["y"])
    return save_graph("sentences.onnx", helper.make_graph([node], "g", ends[:1], ends[1:]))


def test_a_dynamic_shape_without_bounds_is_refused(compile_: Compile, sentences: Path) -> None:
    error = refused(compile_, sentences)
    assert error.code == "dynamic_shape"
    assert "input 'ids' of sentences.onnx, whose items are [?, 4], got none" in error.message
    assert "shapes: {ids: {min:" in error.message


@pytest.mark.parametrize(
    "bounds",
    [
        ((1,), (2,), (3,)),
        ((1, 4), (9, 4), (8, 4)),
        ((1, 4), (2, 4), (3, 5)),
        ((4, 4), (2, 4), (8, 4)),
    ],
    ids=["rank", "best over largest", "a fixed axis", "best under smallest"],
)
def test_bounds_that_do_not_fit_are_refused(
    compile_: Compile, sentences: Path, bounds: tuple[tuple[int, ...], ...]
) -> None:
    error = refused(compile_, sentences, ids=ShapeRange(*bounds))
    assert error.code == "dynamic_shape"
    assert f"got {bounds[0]} to {bounds[2]}" in error.message


def test_bounds_of_an_input_that_there_is_not_are_refused(
    compile_: Compile, classifier: MakeModel
) -> None:
    error = refused(compile_, classifier(), ids=ShapeRange((1,), (1,), (1,)))
    assert "inputs ['x'] of model.onnx, got ['ids']" in error.message


def test_a_shape_as_input_is_refused(compile_: Compile, save_graph: MakeModel) -> None:
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [2])
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [_floats("x", "N", 4), shape],
        [_floats("y", "A", "B")],
    )
    error = refused(compile_, save_graph("reshape.onnx", graph))
    assert error.code == "dynamic_shape"
    assert "'shape' of reshape.onnx" in error.message


def test_inputs_that_numpy_does_not_have_are_refused(
    compile_: Compile, save_graph: MakeModel
) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.BFLOAT16, ["N", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    error = refused(compile_, save_graph("bf16.onnx", graph))
    assert error.code == "unsupported_tensor_type"


def test_too_little_scratch_memory_is_refused_in_the_librarys_words(
    classifier: MakeModel, tmp_path: Path
) -> None:
    backend = TensorRT("tensorrt-rtx", TensorRTSettings(target="sm89", workspace_bytes=1 << 20))
    with pytest.raises(InvalidModel, match="within workspace limit") as refusal:
        backend.compile(classifier(), Profile(BUCKETS), tmp_path)
    assert refusal.value.code == "engine_build_failed"


@pytest.mark.parametrize("target", ["sm90", "sm89,sm90", "89", "", "sm89 sm80"])
def test_gpus_that_it_does_not_build_for_are_refused(target: str) -> None:
    with pytest.raises(InvalidModel) as refusal:
        TensorRT("tensorrt-rtx").for_target(target)
    assert refusal.value.code == "engine_target_unsupported"


# ── without a GPU ───────────────────────────────────────────────────────────────────────────────


@no_gpu
def test_a_plan_that_is_none_is_bad_and_a_good_one_unknown(
    compile_: Compile, classifier: MakeModel, tmp_path: Path
) -> None:
    plan = compile_(classifier())
    folder = tmp_path / "other"
    folder.mkdir()
    backend = TensorRT("tensorrt-rtx")
    for content, verdict in [(plan, "unknown"), (b"no plan" * 100, "bad"), (b"", "bad")]:
        (folder / PLAN_FILE).write_bytes(content)
        assert backend.validity(folder).verdict == verdict
    assert backend.validity(folder).reasons == ("MALFORMED_ENGINE",)


@no_gpu
def test_loading_says_what_is_missing(
    compile_: Compile, classifier: MakeModel, tmp_path: Path
) -> None:
    compile_(classifier())
    with pytest.raises(
        PipelineError, match="install 'headrace\\[cuda\\]' on a machine with a GPU"
    ) as e:
        TensorRT("tensorrt-rtx").load(tmp_path / "artefact", threads=1)
    assert e.value.code == "device_missing"
    assert type(e.value) is PipelineError, "the machine's fault, not the model's"


@no_gpu
def test_a_build_for_this_machine_needs_its_gpu(classifier: MakeModel, tmp_path: Path) -> None:
    backend = TensorRT("tensorrt-rtx")
    for wants_the_gpu in (
        backend.fingerprint,
        lambda: backend.compile(classifier(), Profile(BUCKETS), tmp_path),
    ):
        with pytest.raises(PipelineError) as refusal:
            wants_the_gpu()
        assert refusal.value.code == "device_missing"


def test_an_engine_for_given_gpus_has_one_fingerprint_wherever_it_is_built() -> None:
    backend = TensorRT("tensorrt-rtx")
    fingerprint = backend.for_target("sm89,sm80").fingerprint()
    assert fingerprint["targets"] == [80, 89]
    assert fingerprint == backend.for_target("SM80, sm89").fingerprint()
    assert fingerprint != backend.for_target("sm89").fingerprint()
    assert fingerprint["cuda"] == 13


def test_nothing_is_imported_before_a_model_needs_it() -> None:
    script = """if True:
        import sys
        import pipelines.engines.tensorrt
        vendors = {"tensorrt", "tensorrt_rtx", "cuda", "pycuda", "torch", "onnx", "onnxruntime"}
        assert not vendors & sys.modules.keys(), vendors & sys.modules.keys()
        pipelines.engines.tensorrt.TensorRT("tensorrt-rtx")
        assert vendors & sys.modules.keys() == {"tensorrt_rtx"}
    """
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
