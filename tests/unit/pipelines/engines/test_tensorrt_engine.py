"""The executor's order of calls, its slots and what it does when memory ends, on a recording fake."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.engines import tensorrt_load
from pipelines.engines.engine import DeviceOutOfMemory
from pipelines.engines.machine_cache import MachineCache
from pipelines.engines.tensorrt_engine import TensorRTEngine
from pipelines.engines.tensorrt_library import Library, _logger
from pipelines.engines.tensorrt_load import Validity, validity_of
from pipelines.model import LoadedModel
from schemas.batches import Batch, BatchItem
from schemas.errors import DEVICE_FAILED, InferenceFailed, InvalidModel, PipelineError, Transient
from schemas.payloads import Payload
from tests.unit.pipelines.engines.tensorrt_fake import (
    L4,
    DynamicShapesKernelSpecializationStrategy,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ExecutionContextAllocationStrategy,
    FakeCuda,
    fake_tensorrt,
    plan_of,
)
from workers.inference.stages import Stages

Load = Callable[..., TensorRTEngine]

X = {"x": ("FLOAT", [-1, 4])}
Y = {"y": ("FLOAT", [-1, 4])}
KIB = 1024


def profiles(*rows: int) -> list[dict[str, tuple[list[int], list[int], list[int]]]]:
    return [{"x": ([n, 4], [n, 4], [n, 4])} for n in rows]


PLAN = plan_of(X, Y, profiles(1, 2, 8), scratch=[KIB, 2 * KIB, 8 * KIB])


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def load(cuda: FakeCuda, tmp_path: Path) -> Load:
    """`load(plan, slots=2)`: an engine on the fakes; its library's state is in `load.gpu`."""

    def load(
        plan: bytes = PLAN,
        *,
        trt: Any = None,
        slots: int = 2,
        machine_cache: MachineCache | None = None,
    ) -> TensorRTEngine:
        trt = trt or fake_tensorrt(cuda)
        (tmp_path / "engine.plan").write_bytes(plan)
        return tensorrt_load.load_plan(
            Library(trt, _logger(trt), trt.gpu.is_rtx),
            cuda,
            tmp_path / "engine.plan",
            slots=slots,
            machine_cache=machine_cache,
            host_code=False,
        )

    return load


def batch(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 4), dtype=np.float32)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 9, 16, 19])
def test_a_batch_of_any_size_is_answered_row_by_row(load: Load, rows: int) -> None:
    x = batch(rows)
    y = load().run({"x": x})["y"]
    assert np.array_equal(y, 2 * x)
    assert y.dtype == np.float32


def test_a_run_is_one_launch_and_one_wait(load: Load, cuda: FakeCuda) -> None:
    engine = load(slots=1)
    cuda.calls.clear()
    engine.run({"x": batch(3)})
    assert cuda.calls == ["launch", "wait"]


def test_a_load_runs_each_bucket_once_before_it_captures_it(load: Load, cuda: FakeCuda) -> None:
    load(slots=1)
    context = ["allocate", "allocate"]  # x and y
    run = ["copy_in", "execute", "copy_out"]
    captured = ["begin_capture", *run, "end_capture"]
    replayed = ["launch", "wait"]  # the first launch of a graph sends it to the device
    one = ["wait", *context, *run, "wait", *captured, *replayed]
    assert cuda.calls == ["allocate", *one, *one, *one]


def test_the_smallest_bucket_that_holds_a_batch_is_taken_and_filled_up_with_zeros(
    load: Load, cuda: FakeCuda
) -> None:
    seen: list[np.ndarray] = []

    def compute(x: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(x.copy())
        return {"y": 2 * x}

    engine = load(trt=fake_tensorrt(cuda, compute), slots=1)
    engine.run({"x": batch(8)})
    seen.clear()
    x = batch(3, seed=1)
    engine.run({"x": x})
    [given] = seen
    assert given.shape == (8, 4)
    assert np.array_equal(given[:3], x)
    assert not given[3:].any(), "rows of the batch before are none of this one's business"


def test_what_is_beyond_the_largest_bucket_is_run_in_parts(load: Load, cuda: FakeCuda) -> None:
    engine = load()
    cuda.calls.clear()
    engine.run({"x": batch(17)})
    assert cuda.calls.count("launch") == 3


def test_outputs_belong_to_the_caller(load: Load) -> None:
    engine = load(slots=1)
    first = engine.run({"x": batch(8)})["y"]
    kept = first.copy()
    engine.run({"x": batch(8, seed=1)})
    engine.close()
    assert np.array_equal(first, kept)


# ── slots ───────────────────────────────────────────────────────────────────────────────────────


def test_as_many_batches_as_slots_are_on_the_device_at_once(load: Load, cuda: FakeCuda) -> None:
    engine = load(slots=2)
    both = threading.Barrier(2)
    cuda.before_wait = lambda: both.wait(10) and None  # passes when two are waiting at once
    x = [batch(2, seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda one: engine.run({"x": one})["y"], x))
    assert all(np.array_equal(y, 2 * one) for one, y in zip(x, answers, strict=True))


def test_no_more_batches_than_slots_are_on_the_device(load: Load, cuda: FakeCuda) -> None:
    engine = load(slots=2)
    three = threading.Barrier(3)

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):
            three.wait(0.2)

    cuda.before_wait = meet
    x = [batch(1 + seed, seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda one: engine.run({"x": one})["y"], x))
    assert all(np.array_equal(y, 2 * one) for one, y in zip(x, answers, strict=True))
    assert three.broken


def test_slots_are_handed_from_thread_to_thread(load: Load) -> None:
    engine = load(slots=2)
    x = [batch(1 + seed % 17, seed) for seed in range(300)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda one: engine.run({"x": one})["y"], x))
    assert all(np.array_equal(y, 2 * one) for one, y in zip(x, answers, strict=True))


def test_a_slot_is_free_again_after_a_run_that_failed(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda)
    cuda.uncapturable = True
    engine = load(trt=trt, slots=1)
    trt.gpu.broken, trt.gpu.says = {"execute_async_v3"}, "a kernel went astray"
    for _ in range(3):
        with pytest.raises(InferenceFailed, match="a kernel went astray") as failed:
            engine.run({"x": batch(1)})
        assert failed.value.code == "engine_failed"
    trt.gpu.broken = set()
    assert engine.run({"x": batch(1)})["y"].shape == (1, 4)


@pytest.mark.parametrize(
    ("call", "says"), [("deserialize_cuda_engine", "a kernel is missing"), ("execute_async_v3", "")]
)
def test_what_the_device_did_is_not_blamed_on_the_batch_or_the_plan(
    load: Load, cuda: FakeCuda, call: str, says: str
) -> None:
    """After an illegal access every call fails, the library's too, and says less of it than CUDA."""
    trt = fake_tensorrt(cuda)
    cuda.uncapturable = True
    engine = load(trt=trt)
    trt.gpu.broken, trt.gpu.says, cuda.lost = {call}, says, True
    with pytest.raises(Transient, match="CUDA_ERROR_ILLEGAL_ADDRESS") as failed:
        engine.run({"x": batch(1)}) if call == "execute_async_v3" else load(trt=trt)
    assert failed.value.code == DEVICE_FAILED


def test_an_engine_on_a_device_that_failed_is_closed_with_its_lease(
    load: Load, cuda: FakeCuda
) -> None:
    engine, ended = load(slots=3), []
    engine.after_close(lambda: ended.append(1))
    cuda.lost = True
    engine.close()
    assert ended == [1]
    assert not cuda.graphs, "what can be freed is freed, of every slot"


def test_closing_frees_all_that_was_made_and_contexts_before_their_memory(
    load: Load, cuda: FakeCuda
) -> None:
    engine = load(slots=3)
    assert len(cuda.streams) == 3
    assert len(cuda.graphs) == 9
    cuda.calls.clear()
    engine.close()
    assert cuda.holds_nothing
    assert cuda.calls[0] == "free_graph"
    assert cuda.calls[-1] == "free_stream"
    with pytest.raises(Transient, match="closed"):
        engine.run({"x": batch(1)})


def test_memory_is_what_the_weights_scratch_and_buffers_take(load: Load, cuda: FakeCuda) -> None:
    engine = load(slots=2)
    device_bytes = sum(memory.size for memory in cuda.memory.values())
    assert engine.memory_bytes == device_bytes + len(PLAN)
    one_slot = 8 * KIB + 2 * 16 * (1 + 2 + 8)
    assert device_bytes == 2 * one_slot


# ── graphs ──────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_captured_runs_without_a_graph(load: Load, cuda: FakeCuda) -> None:
    cuda.uncapturable = True
    engine = load(slots=1)
    cuda.calls.clear()
    x = batch(5)
    assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    assert cuda.calls == ["copy_in", "execute", "copy_out", "wait"]


def test_tensorrt_rtx_is_asked_whether_it_can_be_captured(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda, is_rtx=True)
    trt.gpu.branches = True
    engine = load(trt=trt)
    assert not cuda.graphs
    assert engine.run({"x": batch(2)})["y"].shape == (2, 4)


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────

TEXT = plan_of(
    {"ids": ("INT64", [-1, -1]), "mask": ("INT64", [-1, -1])},
    {"sum": ("INT64", [-1]), "same": ("INT64", [-1, -1])},
    [{name: ([n, 0], [n, 4], [n, 16]) for name in ("ids", "mask")} for n in (1, 4)],
    scratch=[0, 0],
)


def summed(ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"sum": (ids * mask).sum(axis=1), "same": ids}


def test_shapes_that_change_run_without_a_graph(load: Load, cuda: FakeCuda) -> None:
    engine = load(TEXT, trt=fake_tensorrt(cuda, summed), slots=1)
    assert not cuda.graphs
    for rows, length in [(1, 5), (3, 16), (4, 0), (6, 2)]:
        ids = np.arange(rows * length).reshape(rows, length)
        answer = engine.run({"ids": ids, "mask": np.ones_like(ids)})
        assert np.array_equal(answer["sum"], ids.sum(axis=1))
        assert np.array_equal(answer["same"], ids)


def test_shapes_out_of_bounds_are_refused_with_the_bounds(load: Load, cuda: FakeCuda) -> None:
    engine = load(TEXT, trt=fake_tensorrt(cuda, summed))
    ids = np.zeros((2, 17), np.int64)
    with pytest.raises(InferenceFailed, match=r"\[0\] to \[16\] for input 'ids', got \[17\]"):
        engine.run({"ids": ids, "mask": ids})


def test_inputs_of_different_batches_are_refused(load: Load, cuda: FakeCuda) -> None:
    engine = load(TEXT, trt=fake_tensorrt(cuda, summed))
    with pytest.raises(InferenceFailed, match=r"one batch, got \{'ids': 2, 'mask': 3\} rows"):
        engine.run({"ids": np.zeros((2, 4), np.int64), "mask": np.zeros((3, 4), np.int64)})


def test_shapes_that_do_not_fit_each_other_are_the_jobs_failure(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda, summed)
    engine = load(TEXT, trt=trt)
    trt.gpu.inference_error = "ids and mask differ"
    with pytest.raises(InferenceFailed, match="ids and mask differ"):
        engine.run({"ids": np.zeros((1, 4), np.int64), "mask": np.zeros((1, 5), np.int64)})


def test_a_graph_without_a_dynamic_batch_is_run_as_it_is(load: Load, cuda: FakeCuda) -> None:
    plan = plan_of({"x": ("HALF", [1, 4])}, {"y": ("HALF", [1, 4])}, [{}], [KIB])
    engine = load(plan)
    x = np.ones((1, 4), np.float16)
    assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    with pytest.raises(InferenceFailed, match=r"Expected float16\[1, 4\]"):
        engine.run({"x": np.ones((2, 4), np.float16)})


def test_a_first_axis_that_is_no_batch_is_left_alone(load: Load, cuda: FakeCuda) -> None:
    shapes = [{"x": ([1, 0], [1, 4], [1, 8])}]
    plan = plan_of({"x": ("FLOAT", [1, -1])}, {"y": ("FLOAT", [-1])}, shapes, [0])
    engine = load(plan, trt=fake_tensorrt(cuda, lambda x: {"y": x[0]}))
    for length in (0, 3, 8):
        x = np.arange(length, dtype=np.float32)[None]
        assert np.array_equal(engine.run({"x": x})["y"], x[0])


def test_an_output_whose_first_axis_is_not_the_batch_is_refused(load: Load, cuda: FakeCuda) -> None:
    """It would be cut to the batch's rows, and the rest of the answers lost."""
    trt = fake_tensorrt(cuda, lambda x: {"y": x.reshape(-1)})
    with pytest.raises(InvalidModel, match=r"'y' .* got \[32\]") as refused:
        load(plan_of(X, {"y": ("FLOAT", [-1])}, profiles(1, 2, 8), [0] * 3), trt=trt)
    assert refused.value.code == "dynamic_shape"
    assert cuda.holds_nothing


def test_an_output_for_the_whole_batch_is_given_as_it_is(load: Load, cuda: FakeCuda) -> None:
    outputs = Y | {"scale": ("FLOAT", [])}
    trt = fake_tensorrt(cuda, lambda x: {"y": 2 * x, "scale": np.array(7, np.float32)})
    engine = load(plan_of(X, outputs, profiles(1, 2, 8), [0] * 3), trt=trt)
    for rows in (1, 8, 19):
        answer = engine.run({"x": batch(rows)})
        assert answer["y"].shape == (rows, 4)
        assert (answer["scale"].shape, answer["scale"]) == ((), 7)


def test_an_input_without_a_batch_is_beside_one_that_has_it(load: Load, cuda: FakeCuda) -> None:
    inputs = X | {"table": ("FLOAT", [3, 4]), "by": ("FLOAT", [])}
    trt = fake_tensorrt(cuda, lambda x, table, by: {"y": x * by + table[0]})
    engine = load(plan_of(inputs, Y, profiles(1, 2, 8), [0] * 3), trt=trt)
    assert cuda.graphs
    table = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    for rows in (2, 19):
        x = batch(rows)
        y = engine.run({"x": x, "table": table, "by": np.array(3, np.float32)})["y"]
        assert np.array_equal(y, x * 3 + table[0])


def test_inputs_of_any_layout_are_taken(load: Load) -> None:
    engine = load()
    wide = np.random.default_rng(0).standard_normal((38, 8), dtype=np.float32)
    for x in (wide[::-2, ::2], np.asfortranarray(batch(8)), np.broadcast_to(batch(1), (5, 4))):
        assert np.array_equal(engine.run({"x": x})["y"], 2 * x)


@pytest.mark.parametrize("name", ["x", "y"])
def test_tensors_in_the_memory_of_the_host_are_refused(
    load: Load, cuda: FakeCuda, name: str
) -> None:
    """The library would take the address on the device for one on the host."""
    trt = fake_tensorrt(cuda)
    trt.gpu.on_host = (name,)
    with pytest.raises(InvalidModel, match=f"{name!r} .*host") as refused:
        load(trt=trt)
    assert refused.value.code == "dynamic_shape"


def test_an_empty_plan_is_refused(load: Load) -> None:
    with pytest.raises(InvalidModel, match="empty") as refused:
        load(b"")
    assert refused.value.code == "engine_unusable"


def test_outputs_whose_shape_depends_on_the_data_are_refused(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda)
    trt.gpu.data_dependent = True
    with pytest.raises(
        InvalidModel, match=r"follow from those of the inputs, got \{'y': \[-1, -1\]"
    ):
        load(trt=trt)
    assert cuda.holds_nothing


def test_types_that_numpy_does_not_have_are_refused(load: Load) -> None:
    plan = plan_of({"x": ("BF16", [-1, 4])}, Y, profiles(1), [0])
    with pytest.raises(InvalidModel, match="'x' is BF16") as refused:
        load(plan)
    assert refused.value.code == "unsupported_tensor_type"


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("room", [0, 4 * KIB, 8 * KIB, 8 * KIB + 200])
def test_a_device_without_room_for_one_slot_may_be_tried_again_and_nothing_stays(
    load: Load, cuda: FakeCuda, room: int
) -> None:
    cuda.memory_bytes = room
    with pytest.raises(DeviceOutOfMemory, match="fewer slots"):
        load()
    assert cuda.holds_nothing


def test_a_later_slot_that_fails_takes_the_first_with_it(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda)
    trt.gpu.most_contexts, trt.gpu.says = 4, "something else than memory"
    with pytest.raises(InvalidModel, match="something else"):
        load(trt=trt, slots=2)
    assert cuda.holds_nothing


@pytest.mark.parametrize(
    "says",
    [
        "Error Code 2: OutOfMemory (Requested size was 8 bytes.)",
        "Error Code 1: Cuda Runtime (out of memory)",
        "cuModuleLoadData: CUDA_ERROR_OUT_OF_MEMORY",
        "cudaErrorMemoryAllocation",
        "Error Code 1: Cublas (CUBLAS_STATUS_ALLOC_FAILED)",
    ],
)
def test_memory_that_ends_is_known_by_each_of_its_names(
    load: Load, cuda: FakeCuda, says: str
) -> None:
    trt = fake_tensorrt(cuda)
    trt.gpu.broken, trt.gpu.says = {"create_execution_context"}, says
    with pytest.raises(DeviceOutOfMemory):
        load(trt=trt)


def test_with_room_for_fewer_slots_there_are_fewer(load: Load, cuda: FakeCuda) -> None:
    cuda.memory_bytes = 2 * 9 * KIB + 100
    engine = load(slots=4)
    assert len(cuda.streams) == 2
    x = batch(9)
    assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    engine.close()
    assert cuda.holds_nothing


def test_running_out_of_memory_in_a_run_may_be_tried_again(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda)
    cuda.uncapturable = True
    engine = load(trt=trt)
    trt.gpu.broken = {"execute_async_v3"}
    trt.gpu.says = "Error Code 2: OutOfMemory (Requested size was 8 bytes.)"
    with pytest.raises(DeviceOutOfMemory, match="running a batch"):
        engine.run({"x": batch(8)})


def test_a_batch_for_which_memory_ends_is_halved_until_it_fits(
    load: Load, cuda: FakeCuda, make_bundle: Callable[..., Any]
) -> None:
    rows: list[int] = []

    def compute(x: np.ndarray) -> dict[str, np.ndarray]:
        rows.append(len(x))
        return {"y": 2 * x}

    trt = fake_tensorrt(cuda, compute)
    cuda.uncapturable = True
    engine = load(plan_of(*_of_three((1, 2, 4, 8)), scratch=[0] * 4), trt=trt)
    model = LoadedModel(make_bundle(more="batch: {buckets: [1, 2, 4, 8]}"), {"main": engine})
    trt.gpu.most_rows = 2
    items = [_item(number) for number in range(8)]
    stages = Stages(None, executors=1)  # type: ignore[arg-type]
    rows.clear()
    outcomes = stages.run(Batch("id", "tiny", 1, 0, 10, 10, False, items), model)
    stages.close()
    answers = [json.loads(outcome.answer or b"{}") for outcome in outcomes]
    assert [answer["outputs"]["y"] for answer in answers] == [[2.0 * n] * 3 for n in range(8)]
    assert max(rows) == 2


def _of_three(buckets: tuple[int, ...]) -> Any:
    shapes = [{"x": ([n, 3], [n, 3], [n, 3])} for n in buckets]
    return {"x": ("FLOAT", [-1, 3])}, {"y": ("FLOAT", [-1, 3])}, shapes


def _item(number: int) -> BatchItem:
    numbers = np.full(3, number, np.float32).tobytes()
    payload = Payload("application/octet-stream", data=numbers)
    return BatchItem(f"job-{number}", "default", payload, {}, 0.0, 9e9)


def test_a_plan_too_large_for_the_device_may_be_tried_again(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda)
    trt.gpu.broken, trt.gpu.says = {"deserialize_cuda_engine"}, "Cuda Runtime (out of memory)"
    with pytest.raises(DeviceOutOfMemory):
        load(trt=trt)


# ── plans ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "call", ["deserialize_cuda_engine", "create_execution_context", "set_tensor_address"]
)
def test_a_plan_that_the_library_refuses_says_why(load: Load, cuda: FakeCuda, call: str) -> None:
    trt = fake_tensorrt(cuda)
    trt.gpu.broken, trt.gpu.says = {call}, "Version tag does not match"
    with pytest.raises(InvalidModel, match="Version tag does not match") as refused:
        load(trt=trt)
    assert refused.value.code == "engine_unusable"
    assert cuda.holds_nothing


def test_a_library_that_does_not_start_is_the_machines_fault(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda)
    trt.gpu.broken, trt.gpu.says = {"start"}, "CUDA initialization failure with error: 35"
    with pytest.raises(PipelineError, match="failure with error: 35") as failed:
        load(trt=trt)
    assert (type(failed.value), failed.value.code) == (PipelineError, "device_missing")


def test_a_plan_for_another_gpu_is_refused_before_it_is_loaded(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda, is_rtx=True)
    reasons = EngineInvalidityDiagnostics
    trt.gpu.validity = (EngineValidity.INVALID, reasons.UNSUPPORTED_CC | reasons.VERSION_MISMATCH)
    with pytest.raises(InvalidModel, match="refused for VERSION_MISMATCH, UNSUPPORTED_CC"):
        load(trt=trt)
    assert trt.gpu.host_code is None, "not deserialised"


@pytest.mark.parametrize(
    ("found", "reasons", "verdict"),
    [
        ("VALID", 0, Validity("valid")),
        ("SUBOPTIMAL", 2, Validity("suboptimal", ("UNSUPPORTED_CC",))),
        ("INVALID", 0, Validity("unknown")),
        ("INVALID", 64, Validity("unknown")),
        ("INVALID", 1 | 64, Validity("bad", ("VERSION_MISMATCH", "CUDA_ERROR"))),
    ],
)
def test_validity_is_what_the_library_says_where_it_can(
    cuda: FakeCuda, found: str, reasons: int, verdict: Validity
) -> None:
    trt = fake_tensorrt(cuda, is_rtx=True)
    trt.gpu.validity = (EngineValidity[found], reasons)
    library = Library(trt, _logger(trt), is_rtx=True)
    assert validity_of(library, trt.Runtime(library.logger), io.BytesIO(PLAN)) == verdict


def test_a_plan_without_room_may_be_tried_again(load: Load, cuda: FakeCuda) -> None:
    trt = fake_tensorrt(cuda, is_rtx=True)
    no_room = EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY
    trt.gpu.validity = (EngineValidity.INVALID, no_room)
    with pytest.raises(DeviceOutOfMemory, match="INSUFFICIENT_GPU_MEMORY"):
        load(trt=trt)


def test_scratch_memory_is_given_and_kernels_are_final_where_a_graph_keeps_them(
    load: Load, cuda: FakeCuda
) -> None:
    for plan, compute, strategy in [(PLAN, None, "EAGER"), (TEXT, summed, "LAZY")]:
        trt = fake_tensorrt(cuda, *([compute] if compute else []), is_rtx=True)
        load(plan, trt=trt, slots=1)
        assert trt.gpu.configs
        for config in trt.gpu.configs:
            assert config.allocation is ExecutionContextAllocationStrategy.USER_MANAGED
            expected = DynamicShapesKernelSpecializationStrategy[strategy]
            assert config.strategy is expected


def test_kernels_that_were_compiled_once_are_there_at_the_next_load(
    load: Load, cuda: FakeCuda, tmp_path: Path
) -> None:
    def known(gpu: Any) -> bytes:
        return gpu.configs[-1].cache.known  # type: ignore[no-any-return]

    for expected in (b"", b"kernel;"):
        trt = fake_tensorrt(cuda, is_rtx=True)
        load(trt=trt, machine_cache=MachineCache(tmp_path / "machine")).close()
        assert known(trt.gpu) == expected
    [kept] = (tmp_path / "machine").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    trt = fake_tensorrt(cuda, is_rtx=True)
    load(trt=trt, machine_cache=MachineCache(tmp_path / "machine"))
    assert known(trt.gpu) == b"", "damaged kernels are compiled again"
    assert cuda.device() == L4
