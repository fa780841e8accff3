"""From a plan to an engine that runs: deserialised if it fits this machine, with its slots, contexts and CUDA
graphs made."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from msgspec import Struct

from pipelines.engines.cuda import Cuda
from pipelines.engines.engine import DeviceOutOfMemory
from pipelines.engines.machine_cache import Entry, MachineCache
from pipelines.engines.tensorrt_context import BucketContext
from pipelines.engines.tensorrt_engine import Loaded, TensorRTEngine
from pipelines.engines.tensorrt_library import Library, checked, errors, started
from pipelines.engines.tensorrt_tensors import Bucket, Tensors, tensors_of
from schemas.errors import InvalidModel

_SAMPLE_BYTES = 64 * 1024
_NO_ROOM = "INSUFFICIENT_GPU_MEMORY"


def load_plan(
    library: Library,
    cuda: Cuda,
    path: Path,
    *,
    slots: int,
    machine_cache: MachineCache | None,
    host_code: bool,
) -> TensorRTEngine:
    """host_code: whether the plan may hold code for this machine's CPU, as plans do that newer versions
    can load. Raises InvalidModel, DeviceOutOfMemory, Transient("device_failed"), or
    PipelineError("device_missing")."""
    with cuda.working():
        runtime = started(library, "Runtime")
        runtime.engine_host_code_allowed = host_code
        engine = _deserialized(library, runtime, path)
        kernels = _Kernels(library, cuda, engine, path, machine_cache)
        tensors = tensors_of(library.trt, engine)
        scratch_bytes = max(
            engine.get_device_memory_size_for_profile_v2(bucket.profile)
            for bucket in tensors.buckets
        )
        loaded = Loaded(
            runtime,
            engine,
            tensors,
            scratch_bytes,
            _contexts(library, cuda, engine, tensors, scratch_bytes, kernels),
        )
        made = TensorRTEngine(cuda, loaded, slots, weights_bytes=path.stat().st_size)
        kernels.keep()
    return made


def _deserialized(library: Library, runtime: Any, path: Path) -> Any:
    doing = f"loading {path.name} into {library.trt.__name__} {library.trt.__version__}"
    with path.open("rb") as file, errors() as said:
        try:
            plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file
            raise InvalidModel(
                "engine_unusable",
                f"Expected {doing} to succeed, the file says: {error}; build it again on this machine"
                " (`headrace engines build --force`).",
            ) from error
        with plan:
            validity_of(library, runtime, file).refuse_bad(path.name)
            engine = runtime.deserialize_cuda_engine(plan)
        return checked(engine, doing, said, InvalidModel, "engine_unusable")


def _contexts(
    library: Library,
    cuda: Cuda,
    engine: Any,
    tensors: Tensors,
    scratch_bytes: int,
    kernels: _Kernels,
) -> Callable[[Bucket, int, int], BucketContext]:
    """Makes a context for a bucket, on a stream, with scratch memory at an address."""
    trt = library.trt
    configs: list[Any] = []  # a context may look at its own for as long as it is there

    def new_context(bucket: Bucket, stream: int, scratch: int) -> BucketContext:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        kernels.use(config, bucket)
        configs.append(config)
        with errors() as said:
            context = engine.create_execution_context(config)
            checked(context, "making a context", said, InvalidModel, "engine_unusable")
        context.set_device_memory(scratch, scratch_bytes)
        return BucketContext(library, cuda, context, tensors, bucket, stream)

    return new_context


class _Kernels:
    """TensorRT-RTX compiles kernels for this GPU while it makes contexts; what it compiled once is kept
    for the next start. TensorRT has no use for it."""

    def __init__(
        self,
        library: Library,
        cuda: Cuda,
        engine: Any,
        path: Path,
        machine_cache: MachineCache | None,
    ) -> None:
        self._trt = library.trt
        self._is_rtx = library.is_rtx
        self._kept: Entry | None = None
        self._compiled: Any = None
        if not library.is_rtx or machine_cache is None:
            return
        with path.open("rb") as file:  # which engine, as a hint: the library looks for itself
            begins = file.read(_SAMPLE_BYTES), path.stat().st_size
        parts = (library.trt.__version__, cuda.device(), begins)
        self._kept = machine_cache.entry("kernels", *parts)
        self._compiled = engine.create_runtime_config().create_runtime_cache()
        if known := self._kept.read():
            self._compiled.deserialize(known)  # what it refuses is compiled again

    def use(self, config: Any, bucket: Bucket) -> None:
        if not self._is_rtx:
            return
        # A captured graph keeps its kernels for good, so they must be the final ones. Where shapes
        # change, waiting for kernels of each would take longer than running the general ones.
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if bucket.fixed else strategies.LAZY
        )
        if self._compiled is not None:
            config.set_runtime_cache(self._compiled)

    def keep(self) -> None:
        if self._kept and (compiled := self._compiled.serialize()) is not None:
            self._kept.write(bytes(compiled))


class Validity(Struct, frozen=True):
    """unknown: nothing speaks against it, and only loading it can tell; always so for TensorRT, and for
    TensorRT-RTX on a machine without a GPU. suboptimal: it runs here, one built here would be faster.
    reasons: why it is bad, in the library's words, such as UNSUPPORTED_CC."""

    verdict: Literal["valid", "suboptimal", "unknown", "bad"]
    reasons: tuple[str, ...] = ()

    def refuse_bad(self, artefact: str) -> None:
        """Raises InvalidModel("engine_unusable"), or DeviceOutOfMemory if only memory is missing."""
        if self.verdict != "bad":
            return
        if self.reasons == (_NO_ROOM,):
            raise DeviceOutOfMemory(
                f"Expected room on the GPU for {artefact}, got {_NO_ROOM}; close other engines, or "
                "use smaller buckets or a larger GPU."
            )
        raise InvalidModel(
            "engine_unusable",
            f"Expected an engine for this GPU, driver and library, {artefact} is refused for "
            f"{', '.join(self.reasons)}; build it again here, or update what is too old.",
        )


def validity_of(library: Library, runtime: Any, plan: BinaryIO) -> Validity:
    """plan: of which the header is read."""
    if not library.is_rtx:
        return Validity("unknown")
    trt = library.trt
    # Without a driver the library finds every plan invalid, and has no reason to name.
    found, diagnostics = runtime.get_engine_validity(plan.read(runtime.engine_header_size))
    reasons = tuple(
        name
        for name, member in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(diagnostics) & int(member)
    )
    if found == trt.EngineValidity.VALID:
        return Validity("valid")
    if found == trt.EngineValidity.SUBOPTIMAL:
        return Validity("suboptimal", reasons)
    missing = reasons in [(), ("CUDA_ERROR",)]
    return Validity("unknown") if missing else Validity("bad", reasons)
