"""TensorRT and CUDA without a GPU: they record the order of calls, and compute with numpy.

The classes have the vendor's names and parameters, no more of them than headrace uses, and
test_tensorrt_contract.py holds them against the real bindings. What is put on a stream happens when
somebody waits for it, so that a result taken too early is the wrong one.
"""

from __future__ import annotations

import enum
import json
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipelines.engines.cuda import OUT_OF_MEMORY, Bytes, Cuda, Device, failure

Compute = Callable[..., dict[str, np.ndarray]]
H100 = Device("NVIDIA H100", 90, 80 * 1024**3, 13000)
L4 = Device("NVIDIA L4", 89, 24 * 1024**3, 13000)

# ── CUDA ────────────────────────────────────────────────────────────────────────────────────────


class FakeCuda(Cuda):
    """calls: in their order. memory_bytes: when it is used up, allocating fails. before_wait: called by
    each wait, on the thread that waits. lost: the device failed, as it does for good."""

    def __init__(self, device: Device = L4, memory_bytes: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.memory_bytes = memory_bytes
        self.before_wait: Callable[[], None] = lambda: None
        self.uncapturable = False
        self.lost = False
        self.memory: dict[int, np.ndarray] = {}
        self.pinned_arrays: dict[int, Bytes] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._device = device
        self._todo: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._last = 0

    def device(self) -> Device:
        return self._device

    @contextmanager
    def active(self) -> Iterator[None]:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._thread.depth -= 1

    def allocate(self, size_bytes: int) -> int:
        self._called("allocate")
        if sum(memory.size for memory in self.memory.values()) + size_bytes > self.memory_bytes:
            raise failure("cuMemAlloc", OUT_OF_MEMORY)
        pointer = self._new() * 0x100000
        self.memory[pointer] = np.full(size_bytes, 0xFF, np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        self._called("free")
        del self.memory[pointer]

    def pinned(self, size_bytes: int) -> Bytes:
        array = np.full(size_bytes, 0xFF, np.uint8)
        self.pinned_arrays[id(array)] = array
        return array

    def free_pinned(self, memory: Bytes) -> None:
        del self.pinned_arrays[id(memory)]

    def new_stream(self) -> int:
        self._expect_device("cuStreamCreate")
        stream = self._new()
        self.streams.add(stream)
        return stream

    def free_stream(self, stream: int) -> None:
        self._expect_device("cuStreamDestroy")
        self._called("free_stream")
        self.streams.remove(stream)

    def copy_in(self, pointer: int, memory: Bytes, stream: int) -> None:
        def work() -> None:
            self.memory[pointer][: memory.size] = memory

        self.put("copy_in", work, stream)

    def copy_out(self, memory: Bytes, pointer: int, stream: int) -> None:
        def work() -> None:
            memory[:] = self.memory[pointer][: memory.size]

        self.put("copy_out", work, stream)

    def put(self, name: str, work: Callable[[], None], stream: int) -> None:
        assert stream in self.streams, "never the default stream"
        self._called(name)
        self._todo[stream].append(work)

    def wait(self, stream: int) -> None:
        self.before_wait()
        self._expect_device("cuEventSynchronize")
        self._called("wait")
        for work in self._todo.pop(stream, []):
            work()

    def capture(self, work: Callable[[], None], stream: int) -> int:
        self._called("begin_capture")
        assert not self._todo[stream], "what is captured does not happen"
        if self.uncapturable:
            raise failure("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        try:
            work()
        finally:
            recorded = self._todo.pop(stream, [])
        self._called("end_capture")
        graph = self._new()
        self.graphs[graph] = recorded
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._called("launch")
        self._todo[stream].extend(self.graphs[graph])

    def free_graph(self, graph: int) -> None:
        self._called("free_graph")
        del self.graphs[graph]

    def _expect_device(self, call: str) -> None:
        if self.lost:
            raise failure(call, "CUDA_ERROR_ILLEGAL_ADDRESS")

    @property
    def holds_nothing(self) -> bool:
        return not (self.memory or self.pinned_arrays or self.streams or self.graphs)

    def _called(self, name: str) -> None:
        assert getattr(self._thread, "depth", 0), f"{name} in a thread without a context"
        self.calls.append(name)

    def _new(self) -> int:
        with self._lock:
            self._last += 1
            return self._last


# ── TensorRT: what stands for itself ────────────────────────────────────────────────────────────


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, INT64, UINT8, BOOL, BF16 = range(8)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32, VERSION_COMPATIBLE = range(2)


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.Enum):
    NONE, SAME_COMPUTE_CAPABILITY, AMPERE_PLUS = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 0


class ComputeCapability(enum.IntEnum):
    NONE, CURRENT, SM80, SM89 = 0, 1, 80, 89


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE = 1, 2, 16, 32
    CUDA_ERROR = 64


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER = range(2)


RTX_ONLY = {
    "ComputeCapability": None,
    "EngineValidity": None,
    "EngineInvalidityDiagnostics": None,
    "DynamicShapesKernelSpecializationStrategy": None,
    "IRuntimeCache": None,
    "Runtime": {"get_engine_validity", "engine_header_size"},
    "IRuntimeConfig": {
        "create_runtime_cache",
        "set_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
    },
    "IExecutionContext": {"is_stream_capturable"},
    "IBuilderConfig": {"num_compute_capabilities", "set_compute_capability"},
}
"""By class, what the classic library does not have; None: the whole class."""


class ErrorCode(enum.Enum):
    """Of the parser."""

    INVALID_NODE, UNSUPPORTED_NODE, UNSUPPORTED_NODE_ATTR = range(3)


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


# ── TensorRT: loading and running ───────────────────────────────────────────────────────────────


def plan_of(
    inputs: dict[str, tuple[str, list[int]]],
    outputs: dict[str, tuple[str, list[int]]],
    profiles: list[dict[str, tuple[list[int], list[int], list[int]]]],
    scratch: list[int],
) -> bytes:
    """A plan that the fake library can load: tensors by name, with type and shape (-1: dynamic); for
    each profile the shapes of inputs (min, opt, max), and how much scratch memory it takes."""
    return json.dumps([inputs, outputs, profiles, scratch]).encode()


class Gpu(SimpleNamespace):
    """What the classes below share. cuda: where tensors lie. compute: inputs to outputs, by name. says:
    what the next failing call logs. broken: names of calls that fail. most_rows: in more it is out of
    memory. most_contexts: that there may be. on_host: names of tensors that lie there. configs, builds: what
    engines and builders were told. refused: what the parser finds wrong."""


class Runtime:
    gpu: Gpu

    def __init__(self, logger: ILogger) -> None:
        _expect_start(self.gpu, logger)
        self._host_code = False
        self._logger = logger

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._host_code = allowed

    @property
    def engine_header_size(self) -> int:
        return 8

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        self.gpu.host_code = self.engine_host_code_allowed
        if _fails(self.gpu, "deserialize_cuda_engine", self._logger):
            return None
        return ICudaEngine(self.gpu, self._logger, json.loads(bytes(serialized_engine)))

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        assert self.gpu.is_rtx
        assert len(buffer) == self.engine_header_size
        found: tuple[EngineValidity, int] = self.gpu.validity
        return found


class ICudaEngine:
    def __init__(self, gpu: Gpu, logger: ILogger, plan: list[Any]) -> None:
        self.gpu, self.logger = gpu, logger
        self.inputs, self.outputs, self.profiles, self.scratch = plan

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.gpu.on_host else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[(self.inputs | self.outputs)[name][0]]

    def get_tensor_shape(self, name: str) -> list[int]:
        shape: list[int] = (self.inputs | self.outputs)[name][1]
        return shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        """Of a dynamic input, which is in each profile; whether of others is not said."""
        shapes: list[list[int]] = self.profiles[profile_index][name]
        return shapes

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        size: int = self.scratch[profile_index]
        return size

    def create_runtime_config(self) -> IRuntimeConfig:
        config = IRuntimeConfig()
        config.told = SimpleNamespace(allocation=None, strategy=None, cache=None, gpu=self.gpu)
        self.gpu.configs.append(config.told)
        return config

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:
        if _fails(self.gpu, "create_execution_context", self.logger):
            return None
        if len(self.gpu.contexts) == self.gpu.most_contexts:
            self.logger.log(ILogger.Severity.ERROR, self.gpu.says)
            return None
        context = IExecutionContext(self, runtime_config)
        self.gpu.contexts.add(context)
        return context


class IRuntimeConfig:
    told: SimpleNamespace

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.told.allocation = strategy

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> Any:
        return self.told.strategy

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, strategy: Any) -> None:
        assert self.told.gpu.is_rtx
        self.told.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.told.cache = cache
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self.known = b""

    def deserialize(self, blob: Any) -> bool:
        self.known = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self.known + b"kernel;"


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine = engine
        self._gpu = engine.gpu
        self._config = weakref.ref(config)  # the library does not keep it
        self._profile: int | None = None
        self._scratch: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self._gpu.cuda.streams
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        if _fails(self._gpu, "set_input_shape", self._engine.logger):
            return False
        self._shapes[name] = tuple(shape)
        if -1 not in self._engine.get_tensor_shape(name):
            return list(shape) == self._engine.get_tensor_shape(name)
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        if error := self._gpu.inference_error:
            raise RuntimeError(error)
        return sorted(self._engine.inputs.keys() - self._shapes.keys())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {k: np.zeros(shape, self._dtype(k)) for k, shape in self._shapes.items()}
        shape: tuple[int, ...] = self._gpu.compute(**zeros)[name].shape
        return tuple(-1 for _ in shape) if self._gpu.data_dependent else shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if _fails(self._gpu, "set_tensor_address", self._engine.logger):
            return False
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert self._gpu.is_rtx
        return not self._gpu.branches

    def execute_async_v3(self, stream_handle: int) -> bool:
        if _fails(self._gpu, "execute_async_v3", self._engine.logger):
            return False
        assert self._config(), "the configuration ended before its context"
        if any(shape[:1] > (self._gpu.most_rows,) for shape in self._shapes.values()):
            self._engine.logger.log(ILogger.Severity.ERROR, "Cuda Runtime (out of memory)")
            return False
        cuda = self._gpu.cuda
        assert self._scratch, "the scratch memory is the caller's to give"
        pointer, size = self._scratch
        assert cuda.memory[pointer].size >= size >= self._engine.scratch[self._profile or 0]
        shapes = dict(self._shapes)

        def work() -> None:
            given = {name: self._tensor(name, shape) for name, shape in shapes.items()}
            for name, array in self._gpu.compute(**given).items():
                self._tensor(name, array.shape)[...] = array

        cuda.put("execute", work, stream_handle)
        return True

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = self._dtype(name)
        memory = self._gpu.cuda.memory[self._addresses[name]]
        return memory[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    def _dtype(self, name: str) -> np.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        return np.dtype({"FLOAT": "f4", "HALF": "f2", "BOOL": "?"}.get(kind, kind.lower()))


def _expect_start(gpu: Gpu, logger: ILogger) -> None:
    if _fails(gpu, "start", logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")


def _fails(gpu: Gpu, call: str, logger: ILogger) -> bool:
    if call in gpu.broken:
        logger.log(ILogger.Severity.ERROR, gpu.says)
        return True
    return False


# ── TensorRT: building ──────────────────────────────────────────────────────────────────────────


class Builder:
    gpu: Gpu

    def __init__(self, logger: ILogger) -> None:
        _expect_start(self.gpu, logger)
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition(self.gpu)

    def create_builder_config(self) -> IBuilderConfig:
        self.gpu.builds.append(IBuilderConfig())
        config: IBuilderConfig = self.gpu.builds[-1]
        return config

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        self._logger.log(ILogger.Severity.VERBOSE, "Tactic: 0x1 Time: 0.01")
        self._logger.log(ILogger.Severity.INFO, "Engine generation completed in 0.3 seconds.")
        failed = _fails(self.gpu, "build_serialized_network", self._logger)
        return None if failed else b"a plan"


class INetworkDefinition:
    def __init__(self, gpu: Gpu) -> None:
        self._inputs, self._outputs = gpu.network

    @property
    def num_layers(self) -> int:
        return 7

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        tensor: ITensor = self._inputs[index]
        return tensor

    def get_output(self, index: int) -> ITensor:
        tensor: ITensor = self._outputs[index]
        return tensor


class ITensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self._name, self._dtype, self._shape = name, dtype, shape

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def is_shape_tensor(self) -> bool:
        return False


class OnnxParser:
    gpu: Gpu

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        pass

    def parse_from_file(self, model: str) -> bool:
        return not self.gpu.refused

    @property
    def num_errors(self) -> int:
        return len(self.gpu.refused)

    def get_error(self, index: int) -> ParserError:
        error: ParserError = self.gpu.refused[index]
        return error


class ParserError:
    def __init__(self, code: ErrorCode, desc: str, node: int, operator: str, name: str) -> None:
        """node: its number, -1 where the error is of none."""
        self._told = code, desc, node, operator, name

    def code(self) -> ErrorCode:
        return self._told[0]

    def desc(self) -> str:
        return self._told[1]

    def node(self) -> int:
        return self._told[2]

    def node_operator(self) -> str:
        return self._told[3]

    def node_name(self) -> str:
        return self._told[4]


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = min, opt, max


class IBuilderConfig:
    """Remembers what it was told: see `flags`, `pools`, `profiles` and the properties."""

    def __init__(self) -> None:
        self.told_flags = {BuilderFlag.TF32}
        self.told_pools: dict[MemoryPoolType, int] = {}
        self.told_profiles: list[IOptimizationProfile] = []
        self.told_timings: list[bytes] = []
        self.told_targets = [ComputeCapability.CURRENT]
        self._level, self._hardware = 3, HardwareCompatibilityLevel.NONE

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self._level = level

    @property
    def hardware_compatibility_level(self) -> HardwareCompatibilityLevel:
        return self._hardware

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level: HardwareCompatibilityLevel) -> None:
        self._hardware = level

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.told_targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self.told_targets = [ComputeCapability.NONE] * count

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        self.told_targets[index] = compute_capability
        return True

    def set_flag(self, flag: BuilderFlag) -> None:
        self.told_flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.told_flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.told_pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.told_profiles.append(profile)
        return len(self.told_profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        self.told_timings.append(serialized_timing_cache)
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return not cache.known.startswith(b"another GPU")


class ITimingCache:
    def __init__(self, known: bytes) -> None:
        self.known = known

    def serialize(self) -> bytes:
        return self.known + b"timing;"


# ── the module ──────────────────────────────────────────────────────────────────────────────────


def double(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"y": 2 * x}


CLASSES: tuple[type, ...] = (
    *(DataType, TensorIOMode, TensorLocation, NetworkDefinitionCreationFlag, BuilderFlag),
    MemoryPoolType,
    *(HardwareCompatibilityLevel, ExecutionContextAllocationStrategy, ComputeCapability),
    *(EngineValidity, EngineInvalidityDiagnostics, DynamicShapesKernelSpecializationStrategy),
    *(ErrorCode, ILogger.Severity),
    *(ILogger, Runtime, ICudaEngine, IRuntimeConfig, IRuntimeCache, IExecutionContext),
    *(Builder, INetworkDefinition, ITensor, OnnxParser, ParserError, IOptimizationProfile),
    *(IBuilderConfig, ITimingCache),
)

CONSTRUCTED = {ILogger, Runtime, Builder, OnnxParser}
"""By headrace; the library makes the others, so that how the fakes of those are made is their own affair."""


def fake_tensorrt(cuda: FakeCuda, compute: Compute = double, *, is_rtx: bool = False) -> Any:
    """A module of its own, with its state in `gpu`."""
    gpu = Gpu(
        cuda=cuda,
        is_rtx=is_rtx,
        compute=compute,
        broken=set(),
        says="",
        configs=[],
        builds=[],
        network=(
            [ITensor("x", DataType.FLOAT, (-1, 4))],
            [ITensor("y", DataType.FLOAT, (-1, 4))],
        ),
        validity=(EngineValidity.VALID, 0),
        inference_error="",
        data_dependent=False,
        branches=False,
        most_rows=1000,
        contexts=weakref.WeakSet(),
        most_contexts=1000,
        on_host=(),
        refused=[],
        host_code=None,
    )
    members: dict[str, Any] = {cls.__name__: cls for cls in CLASSES}
    for cls in (Runtime, Builder, OnnxParser):
        members[cls.__name__] = type(cls.__name__, (cls,), {"gpu": gpu})
    name = "tensorrt_rtx" if is_rtx else "tensorrt"
    return SimpleNamespace(__name__=name, __version__="11.4.0.106", gpu=gpu, **members)
