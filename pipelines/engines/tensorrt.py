"""Engines on NVIDIA GPUs, by TensorRT or TensorRT-RTX: one code path, chosen by the backend's name.

TensorRT times kernels on the very GPU that an engine is for, so it builds on such a machine.
TensorRT-RTX builds anywhere, for any GPU it is told, and compiles kernels for the one it finds when
it loads.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from contextlib import suppress
from pathlib import Path

from msgspec import Struct, structs

from pipelines.engines.cuda import Device, open_cuda
from pipelines.engines.engine import Engine, Profile
from pipelines.engines.tensorrt_build import BuildOptions, build_plan
from pipelines.engines.tensorrt_caches import MachineCache
from pipelines.engines.tensorrt_library import import_library
from pipelines.engines.tensorrt_load import load_plan
from pipelines.engines.tensorrt_validity import Validity, validity_of
from schemas.errors import InvalidModel, PipelineError

PLAN_FILE = "engine.plan"

_CUDA_MAJORS = range(11, 20)
_TARGET = re.compile(r"sm(\d+)")


class Probe(Struct, frozen=True):
    """What of a backend is here. version: of its library. missing: what is not, with the remedy."""

    version: str | None
    device: Device | None
    missing: tuple[str, ...]


def probe(name: str) -> Probe:
    """name: of the backend. Imports its library; raises nothing."""
    version, device, missing = None, None, []
    try:
        version = str(import_library(name).trt.__version__)
    except PipelineError as error:
        missing.append(error.message)
    try:
        device = open_cuda().device()
    except PipelineError as error:
        missing.append(error.message)
    return Probe(version, device, tuple(missing))


class TensorRT:
    """The backend. Made once per process; imports the vendor's library, opens no device."""

    def __init__(
        self,
        name: str = "tensorrt",
        options: BuildOptions | None = None,
        *,
        slots: int = 2,
        machine_cache: Path | None = None,
    ) -> None:
        """name: tensorrt or tensorrt-rtx. slots: batches of one engine on the device at once.
        machine_cache: a folder for what this machine learns (see MachineCache); without it, nothing
        is kept. Raises PipelineError("backend_missing"), and InvalidModel for unknown targets."""
        self.name = name
        self._library = import_library(name)
        self.version: str = self._library.trt.__version__
        self._options = options or BuildOptions()
        self._slots = slots
        self._machine_cache = machine_cache
        self._refuse_unknown(self._options.targets)

    def for_target(self, target: str) -> TensorRT:
        """The same for other GPUs than this machine's: `sm89`, or several as `sm80,sm89`.
        Raises InvalidModel."""
        targets = [_TARGET.fullmatch(word.strip().lower()) for word in target.split(",")]
        if not self._library.is_rtx or None in targets:
            raise InvalidModel(
                "engine_target_unsupported",
                f"Expected targets of tensorrt-rtx such as sm89 or sm80,sm89, got {target!r} of "
                f"{self.name}; TensorRT builds on a machine with the GPU itself.",
            )
        numbers = tuple(sorted({int(found[1]) for found in targets if found}))
        return TensorRT(
            self.name,
            structs.replace(self._options, targets=numbers),
            slots=self._slots,
            machine_cache=self._machine_cache,
        )

    def fingerprint(self) -> dict[str, object]:
        """Of an engine for TensorRT-RTX the same wherever it is built. Raises
        PipelineError("device_missing") where it depends on this machine's GPU and there is none."""
        common = {
            "os": platform.system(),
            "architecture": platform.machine(),
            "cuda": _cuda_major(self.name),
            "workspace_bytes": self._options.workspace_bytes,
            "tf32": self._options.tf32,
        }
        if self._library.is_rtx:
            return common | {"targets": list(self._targets())}
        return common | {
            "device": self._device_key(open_cuda().device()),
            "hardware_compatibility": self._options.hardware_compatibility,
            "version_compatible": self._options.version_compatible,
            "optimization_level": self._options.optimization_level,
        }

    def compile(self, model: Path, profile: Profile, into: Path) -> None:
        """TensorRT needs the GPU for it; TensorRT-RTX only to find out which it is."""
        if self._library.is_rtx:
            options = structs.replace(self._options, targets=self._targets())
            plan = build_plan(self._library, model, profile, options, None)
        else:
            cuda = open_cuda()
            timings = self._timings(cuda.device())
            with cuda.active():
                plan = build_plan(self._library, model, profile, self._options, timings)
        (into / PLAN_FILE).write_bytes(plan)

    def validity(self, artefact: Path) -> Validity:
        """Whether `load` would take it here, as far as can be told without loading."""
        plan = (artefact / PLAN_FILE).read_bytes()
        runtime = self._library.trt.Runtime(self._library.logger)
        return validity_of(self._library, runtime, plan)

    def load(self, artefact: Path, *, threads: int) -> Engine:
        """Runs each bucket once on each slot: all that a first run makes is made. threads: one anyway."""
        return load_plan(
            self._library,
            open_cuda(),
            artefact / PLAN_FILE,
            slots=self._slots,
            machine_cache=self._machine_cache,
            host_code=self._options.version_compatible,
        )

    def _targets(self) -> tuple[int, ...]:
        if self._options.targets:
            return self._options.targets
        target = open_cuda().device().compute_capability
        self._refuse_unknown((target,))
        return (target,)

    def _refuse_unknown(self, targets: tuple[int, ...]) -> None:
        if not self._library.is_rtx:
            return
        known = [
            name for name in self._library.trt.ComputeCapability.__members__ if name[:2] == "SM"
        ]
        if unknown := [f"SM{target}" for target in targets if f"SM{target}" not in known]:
            raise InvalidModel(
                "engine_target_unsupported",
                f"Expected GPUs of {', '.join(known)}, which TensorRT-RTX {self.version} builds for, "
                f"got {', '.join(unknown)}; use the backend tensorrt there.",
            )

    def _device_key(self, device: Device) -> dict[str, object]:
        """What of the GPU an engine depends on: less, the more others it shall run on."""
        match self._options.hardware_compatibility:
            case "ampere_plus":
                return {}
            case "same_compute_capability":
                return {"compute_capability": device.compute_capability}
            case _:
                return {
                    "name": device.name,
                    "compute_capability": device.compute_capability,
                    "memory_bytes": device.memory_bytes,
                }

    def _timings(self, device: Device) -> MachineCache | None:
        if self._machine_cache is None:
            return None
        return MachineCache(self._machine_cache, "timings", self.version, device)


def _cuda_major(name: str) -> int | None:
    """Which CUDA the library was made for, by the wheel that it came in; None if it came in another way."""
    for major in _CUDA_MAJORS:
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{name}-cu{major}-bindings")
            return major
    return None
