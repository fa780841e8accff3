"""From an ONNX file to TensorRT's plan, by the classic library and by TensorRT-RTX alike."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from pipelines.engines.engine import Profile
from pipelines.engines.tensorrt_caches import MachineCache
from pipelines.engines.tensorrt_library import Library, checked, errors
from pipelines.engines.tensorrt_onnx import Shapes, parse, profile_shapes
from schemas.errors import InvalidModel

_one_at_a_time = threading.Lock()
"""A builder times kernels on the device: a second one would spoil its times."""


class BuildOptions(Struct, frozen=True):
    """What a deployment asks of its builds; part of the cache key.

    targets: for TensorRT-RTX, the compute capabilities an engine is for, such as 89 for 8.9; by
    default that of this machine's GPU. The rest is TensorRT's alone. hardware_compatibility: other
    GPUs it shall run on as well, slower. version_compatible: newer versions can load it, slower.
    optimization_level: 0 to 5, how long to look for faster kernels. workspace_bytes: most scratch
    memory of a layer (0: any). tf32: float32 is multiplied with 10 bits of its fraction.
    """

    targets: tuple[int, ...] = ()
    hardware_compatibility: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    version_compatible: bool = False
    optimization_level: int = 3
    workspace_bytes: int = 0
    tf32: bool = False


def build_plan(
    library: Library,
    model: Path,
    profile: Profile,
    options: BuildOptions,
    timings: MachineCache | None,
) -> Any:
    """The plan, as a buffer. Raises InvalidModel or DeviceOutOfMemory."""
    with _one_at_a_time, errors() as said:
        builder = checked(
            library.trt.Builder(library.logger),
            "starting a builder",
            said,
            InvalidModel,
            "engine_build_failed",
        )
        network, parser = parse(library, builder, model)
        config = builder.create_builder_config()
        _set_options(library, config, options)
        for shapes in profile_shapes(network, profile, model):
            _add_profile(builder, config, shapes)
        timing_cache = _use_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        del parser
        checked(plan, f"building {model.name}", said, InvalidModel, "engine_build_failed")
    if timings and timing_cache:
        timings.write(bytes(timing_cache.serialize()))
    return plan


def _set_options(library: Library, config: Any, options: BuildOptions) -> None:
    trt = library.trt
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # which is set by default
    if options.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if library.is_rtx:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            capability = trt.ComputeCapability.__members__[f"SM{target}"]
            config.set_compute_capability(capability, index)
        return
    config.builder_optimization_level = options.optimization_level
    level = options.hardware_compatibility.upper()
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _add_profile(builder: Any, config: Any, shapes: Shapes) -> None:
    profile = builder.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        profile.set_shape(name, smallest, best, largest)
    config.add_optimization_profile(profile)  # if it is refused, so is the build, with the reason


def _use_timings(config: Any, timings: MachineCache | None) -> Any:
    """Spare the builder the timing of kernels that were timed before on such a GPU."""
    if timings is None:
        return None
    for known in (timings.read(), b""):  # what another version timed may be refused
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None
