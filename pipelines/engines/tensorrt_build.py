"""From an ONNX file to TensorRT's plan, by the classic library and by TensorRT-RTX alike."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.settings import TensorRTSettings
from pipelines.engines.build_log import tell
from pipelines.engines.engine import Profile
from pipelines.engines.machine_cache import Entry
from pipelines.engines.tensorrt_library import Library, checked, errors, started
from pipelines.engines.tensorrt_onnx import Shapes, parse, profile_shapes
from schemas.errors import InvalidModel

_one_at_a_time = threading.Lock()
"""A builder times kernels on the device: a second one would spoil its times."""


def build_plan(
    library: Library,
    model: Path,
    profile: Profile,
    settings: TensorRTSettings,
    *,
    targets: Sequence[int] = (),
    timings: Entry | None = None,
) -> Any:
    """The plan, as a buffer. targets: TensorRT-RTX's, such as 89 for compute capability 8.9. timings: of
    kernels, TensorRT's. Raises InvalidModel, DeviceOutOfMemory, or PipelineError("device_missing")."""
    with _one_at_a_time, errors() as said:
        builder = started(library, "Builder")
        network, parser = parse(library, builder, model)
        config = builder.create_builder_config()
        _set_options(library, config, settings)
        if library.is_rtx:
            _set_targets(library, config, targets)
        profiles = profile_shapes(network, profile, model)
        for shapes in profiles:
            _add_profile(builder, config, shapes)
        tell("network_parsed", layers=network.num_layers, profiles=len(profiles))
        timing_cache = _use_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        del parser
        checked(plan, f"building {model.name}", said, InvalidModel, "engine_build_failed")
    if timings and timing_cache:
        timings.write(bytes(timing_cache.serialize()))
    return plan


def _set_options(library: Library, config: Any, settings: TensorRTSettings) -> None:
    trt = library.trt
    config.clear_flag(trt.BuilderFlag.TF32)  # or float32 is multiplied with 10 bits of its fraction
    if settings.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if library.is_rtx:
        return
    config.builder_optimization_level = settings.optimization_level
    level = settings.hardware_compatibility.upper()
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _set_targets(library: Library, config: Any, targets: Sequence[int]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = library.trt.ComputeCapability.__members__[f"SM{target}"]
        config.set_compute_capability(capability, index)


def _add_profile(builder: Any, config: Any, shapes: Shapes) -> None:
    profile = builder.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        profile.set_shape(name, smallest, best, largest)
    config.add_optimization_profile(profile)  # if it is refused, so is the build, with the reason


def _use_timings(config: Any, timings: Entry | None) -> Any:
    """Spare the builder the timing of kernels that were timed before on such a GPU."""
    if timings is None:
        return None
    for known in (timings.read(), b""):  # what another version timed may be refused
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None
