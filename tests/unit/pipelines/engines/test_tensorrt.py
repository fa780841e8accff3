"""The backend: what it asks of the classic library's builder, what an engine depends on, what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.settings import TensorRTSettings
from pipelines.engines import tensorrt
from pipelines.engines.backends import Backends
from pipelines.engines.build_log import recorded
from pipelines.engines.engine import DeviceOutOfMemory, Profile
from pipelines.engines.machine_cache import MachineCache
from pipelines.engines.tensorrt import PLAN_FILE, TensorRT
from pipelines.engines.tensorrt_library import checked, import_library
from pipelines.engines.tensorrt_load import Validity
from schemas.errors import DEVICE_FAILED, InvalidModel, PipelineError, Transient
from tests.unit.pipelines.engines.tensorrt_fake import (
    H100,
    L4,
    BuilderFlag,
    DataType,
    ErrorCode,
    FakeCuda,
    HardwareCompatibilityLevel,
    ITensor,
    MemoryPoolType,
    ParserError,
    fake_tensorrt,
    plan_of,
)

MODEL = Path("model.onnx")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda(L4)
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: cuda)
    return cuda


@pytest.fixture
def trt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The classic library, in the place of the real one."""
    trt = fake_tensorrt(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    import_library.cache_clear()
    yield trt
    import_library.cache_clear()


# ── what the builder is asked for ───────────────────────────────────────────────────────────────


def test_each_bucket_is_a_profile_with_its_batch_fixed(trt: Any, tmp_path: Path) -> None:
    TensorRT().compile(MODEL, Profile((1, 2, 8)), tmp_path)
    [config] = trt.gpu.builds
    assert [profile.shapes["x"] for profile in config.told_profiles] == [
        ((rows, 4),) * 3 for rows in (1, 2, 8)
    ]
    assert (tmp_path / PLAN_FILE).read_bytes() == b"a plan"


def test_a_graph_without_dynamic_axes_gets_no_profile(trt: Any, tmp_path: Path) -> None:
    trt.gpu.network = [ITensor("x", DataType.FLOAT, (1, 4))], [ITensor("y", DataType.FLOAT, (1, 4))]
    TensorRT().compile(MODEL, Profile((1, 8)), tmp_path)
    [config] = trt.gpu.builds
    assert config.told_profiles == []


def test_float32_is_not_rounded(trt: Any, tmp_path: Path) -> None:
    """By default the library takes TF32."""
    TensorRT().compile(MODEL, Profile((1,)), tmp_path)
    [config] = trt.gpu.builds
    assert config.told_flags == set()


def test_settings_reach_the_builder(trt: Any, tmp_path: Path) -> None:
    settings = TensorRTSettings(
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        optimization_level=5,
        workspace_bytes=1 << 20,
    )
    TensorRT(settings=settings).compile(MODEL, Profile((1,)), tmp_path)
    [config] = trt.gpu.builds
    assert config.told_flags == {BuilderFlag.VERSION_COMPATIBLE}
    assert config.told_pools == {MemoryPoolType.WORKSPACE: 1 << 20}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level is HardwareCompatibilityLevel.AMPERE_PLUS


@pytest.mark.parametrize(
    ("says", "error", "code"),
    [
        ("Could not find any implementation for node /conv", InvalidModel, "engine_build_failed"),
        ("Cuda Runtime (out of memory)", DeviceOutOfMemory, "device_out_of_memory"),
    ],
)
def test_a_build_that_fails_says_why(
    trt: Any, tmp_path: Path, says: str, error: type[PipelineError], code: str
) -> None:
    trt.gpu.broken, trt.gpu.says = {"build_serialized_network"}, says
    with pytest.raises(error) as failed:
        TensorRT().compile(MODEL, Profile((1,)), tmp_path)
    assert failed.value.code == code
    assert says in failed.value.message
    assert "model.onnx" in failed.value.message
    assert not list(tmp_path.iterdir())


def test_a_builder_that_does_not_start_is_the_machines_fault(trt: Any, tmp_path: Path) -> None:
    trt.gpu.broken, trt.gpu.says = {"start"}, "CUDA initialization failure with error: 35"
    with pytest.raises(PipelineError, match="failure with error: 35") as failed:
        TensorRT().compile(MODEL, Profile((1,)), tmp_path)
    assert (type(failed.value), failed.value.code) == (PipelineError, "device_missing")


def test_a_device_that_failed_while_building_is_not_the_models_fault(
    trt: Any, tmp_path: Path
) -> None:
    trt.gpu.broken, trt.gpu.says = {"build_serialized_network"}, "no implementation for node /conv"
    trt.gpu.cuda.lost = True
    with pytest.raises(Transient) as failed:
        TensorRT().compile(MODEL, Profile((1,)), tmp_path)
    assert failed.value.code == DEVICE_FAILED


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("engine_build_failed", "raise HEADRACE_ENGINES__TENSORRT__WORKSPACE_BYTES"),
        ("engine_unusable", r"build it again on this machine .*--force`\), or update a driver"),
        ("engine_failed", "check the shapes"),
        ("device_missing", "see with nvidia-smi"),
    ],
)
def test_a_call_that_fails_says_what_to_do(code: str, remedy: str) -> None:
    with pytest.raises(PipelineError, match=f"Expected it to succeed.*: why; {remedy}") as failed:
        checked(None, "it", ["why"], PipelineError, code)
    assert failed.value.code == code


def test_every_error_of_the_parser_is_shown(trt: Any, tmp_path: Path) -> None:
    trt.gpu.refused = [
        ParserError(ErrorCode.UNSUPPORTED_NODE, "no importer", 3, "Unique", "/head/unique"),
        ParserError(ErrorCode.INVALID_NODE, "axis 9", 4, "Softmax", "/head/softmax"),
        ParserError(ErrorCode.INVALID_NODE, "weights are missing", -1, "", ""),
    ]
    with pytest.raises(InvalidModel) as refused:
        TensorRT().compile(MODEL, Profile((1,)), tmp_path)
    assert refused.value.code == "unsupported_operator"
    assert (
        "its parser says: operator Unique of node '/head/unique': UNSUPPORTED_NODE: no importer; "
        "operator Softmax of node '/head/softmax': INVALID_NODE: axis 9; "
        "INVALID_NODE: weights are missing; export the graph"
    ) in refused.value.message
    del trt.gpu.refused[0]
    with pytest.raises(InvalidModel, match=r"axis 9.*check the file with onnx\.checker") as refused:
        TensorRT().compile(MODEL, Profile((1,)), tmp_path)
    assert refused.value.code == "unusable_onnx"


def test_the_builders_log_says_what_was_done_and_under_which_driver(
    trt: Any, tmp_path: Path
) -> None:
    with recorded() as log:
        TensorRT().compile(MODEL, Profile((1, 8)), tmp_path)
    parsed, said, compiled = log().splitlines()
    assert "layers=7 profiles=2" in parsed
    assert "Engine generation completed in 0.3 seconds." in said
    assert "NVIDIA L4" in compiled
    assert "driver=13000" in compiled
    assert f"bytes={len(b'a plan')} seconds=" in compiled


# ── times of kernels ────────────────────────────────────────────────────────────────────────────


def test_kernels_are_timed_once_on_a_machine(trt: Any, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        backend = TensorRT(machine_cache=MachineCache(tmp_path / "machine"))
        backend.compile(MODEL, Profile((1,)), tmp_path / folder)
    assert [config.told_timings for config in trt.gpu.builds] == [[b""], [b"timing;"]]
    [kept] = (tmp_path / "machine").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    assert kept.parent.stat().st_mode & 0o077 == 0


def test_times_of_another_gpu_are_not_used(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TensorRT(machine_cache=MachineCache(tmp_path / "machine"))
    backend.compile(MODEL, Profile((1,)), tmp_path)
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: trt.gpu.cuda)
    monkeypatch.setattr(trt.gpu.cuda, "_device", H100)
    backend.compile(MODEL, Profile((1,)), tmp_path)
    assert [config.told_timings for config in trt.gpu.builds] == [[b""], [b""]]


def test_times_that_the_library_refuses_are_left(trt: Any, tmp_path: Path) -> None:
    backend = TensorRT(machine_cache=MachineCache(tmp_path / "machine"))
    cache = backend._timings(L4)
    assert cache
    cache.write(b"another GPU")
    backend.compile(MODEL, Profile((1,)), tmp_path)
    assert trt.gpu.builds[0].told_timings == [b"another GPU", b""]
    assert cache.read() == b"timing;"


def test_a_folder_that_cannot_be_written_costs_time_alone(trt: Any, tmp_path: Path) -> None:
    (tmp_path / "machine").write_text("a file")
    backend = TensorRT(machine_cache=MachineCache(tmp_path / "machine"))
    backend.compile(MODEL, Profile((1,)), tmp_path)
    assert (tmp_path / PLAN_FILE).exists()


# ── what an engine depends on ───────────────────────────────────────────────────────────────────


def test_all_that_a_plan_depends_on_is_in_the_fingerprint(
    trt: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = TensorRT().fingerprint()
    assert here == TensorRT().fingerprint()
    assert here["device"] == {
        "name": "NVIDIA L4",
        "compute_capability": 89,
        "memory_bytes": 24 * 1024**3,
    }
    for setting in [
        {"version_compatible": True},
        {"optimization_level": 1},
        {"workspace_bytes": 1},
        {"hardware_compatibility": "same_compute_capability"},
        {"hardware_compatibility": "ampere_plus"},
    ]:
        assert TensorRT(settings=TensorRTSettings(**setting)).fingerprint() != here, setting
    assert TensorRT(settings=TensorRTSettings(slots=3)).fingerprint() == here
    monkeypatch.setattr(cuda, "_device", H100)
    assert TensorRT().fingerprint() != here


@pytest.mark.parametrize(
    ("compatible", "device"),
    [("same_compute_capability", {"compute_capability": 89}), ("ampere_plus", {})],
)
def test_an_engine_for_more_gpus_depends_on_less_of_one(
    trt: Any, compatible: Any, device: dict[str, object]
) -> None:
    backend = TensorRT(settings=TensorRTSettings(hardware_compatibility=compatible))
    assert backend.fingerprint()["device"] == device


def test_later_versions_of_a_major_share_an_engine_only_where_they_can_load_it(trt: Any) -> None:
    compatible = TensorRTSettings(version_compatible=True)
    assert (TensorRT().version, TensorRT(settings=compatible).version) == ("11.4.0.106", "11")
    rtx = TensorRTSettings(target="sm89")
    assert TensorRT(settings=rtx).fingerprint() == TensorRT().fingerprint(), "TensorRT-RTX's alone"


def test_tensorrt_is_for_the_machine_it_builds_on(trt: Any) -> None:
    with pytest.raises(InvalidModel, match="on a machine with the GPU itself") as refused:
        TensorRT().for_target("sm89")
    assert refused.value.code == "engine_target_unsupported"


# ── loading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version_compatible", [False, True])
def test_what_was_compiled_is_loaded_and_runs(
    trt: Any, tmp_path: Path, version_compatible: bool
) -> None:
    shapes = [{"x": ([n, 4], [n, 4], [n, 4])} for n in (1, 8)]
    plan = plan_of({"x": ("FLOAT", [-1, 4])}, {"y": ("FLOAT", [-1, 4])}, shapes, [0, 64])
    (tmp_path / PLAN_FILE).write_bytes(plan)
    settings = TensorRTSettings(version_compatible=version_compatible, slots=3)
    backend = TensorRT(settings=settings)
    assert backend.validity(tmp_path) == Validity("unknown")
    engine = backend.load(tmp_path, threads=1)
    x = np.ones((3, 4), np.float32)
    assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    assert len(trt.gpu.cuda.streams) == 3
    assert trt.gpu.host_code is version_compatible, "code for the host only where it was asked for"
    engine.close()


def test_an_empty_plan_is_to_be_built_again(trt: Any, tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).touch()
    with pytest.raises(InvalidModel, match="empty file; build it again") as refused:
        TensorRT().load(tmp_path, threads=1)
    assert refused.value.code == "engine_unusable"


# ── what is missing ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [ImportError, OSError])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_library_says_which_extra_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception]
) -> None:
    class Broken:
        def find_spec(self, module: str, *_: object) -> None:
            if module.startswith("tensorrt"):
                raise error("libnvinfer.so.11: cannot open shared object file")

    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    import_library.cache_clear()
    with pytest.raises(
        PipelineError, match=rf"libnvinfer.*install 'headrace\[{name}\]'"
    ) as missing:
        TensorRT(name)
    assert missing.value.code == "backend_missing"
    assert type(missing.value) is PipelineError
    import_library.cache_clear()


def test_a_library_that_is_too_old_is_refused(trt: Any) -> None:
    trt.__version__ = "10.9.0.34"
    with pytest.raises(PipelineError, match=r"TensorRT 10\.16 or newer, came 10\.9\.0\.34"):
        TensorRT()


def test_the_backends_are_known_by_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []
    monkeypatch.setattr(tensorrt, "TensorRT", lambda *given: made.append(given) or given)
    given = TensorRTSettings(slots=3), MachineCache(tmp_path)
    backends = Backends(*given)
    for name in ("tensorrt", "tensorrt-rtx", "tensorrt"):
        assert backends.get(name) == (name, *given)
    assert len(made) == 2, "one of each"
    with pytest.raises(InvalidModel, match="tensorrt, tensorrt-rtx, got 'tpu'; name one"):
        backends.get("tpu")
