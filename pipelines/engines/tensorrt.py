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

from infra.settings import TensorRTSettings
from pipelines.engines.cuda import Device, open_cuda
from pipelines.engines.engine import Engine, Profile
from pipelines.engines.machine_cache import Entry, MachineCache
from pipelines.engines.tensorrt_library import import_library, started
from pipelines.engines.tensorrt_load import Validity, load_plan, validity_of
from schemas.errors import InvalidModel

PLAN_FILE = "engine.plan"

_CUDA_MAJORS = range(11, 20)
_TARGETS = re.compile(r"sm\d+(,sm\d+)*")


class TensorRT:
    """The backend. Made once per process; imports the vendor's library, opens no device."""

    def __init__(
        self,
        name: str = "tensorrt",
        settings: TensorRTSettings | None = None,
        machine_cache: MachineCache | None = None,
    ) -> None:
        """name: tensorrt or tensorrt-rtx. machine_cache: without it, nothing is kept of what is learnt.
        Raises PipelineError("backend_missing"), and InvalidModel for unknown targets."""
        self.name = name
        self._library = import_library(name)
        self._settings = settings or TensorRTSettings()
        self._machine_cache = machine_cache
        self._version_compatible = self._settings.version_compatible and not self._library.is_rtx
        self._chosen_targets = _numbers(self._settings.target) if self._library.is_rtx else ()
        self._refuse_unknown(self._chosen_targets)

    @property
    def version(self) -> str:
        """Of the library; its major version alone where later ones shall load the same engines."""
        exact: str = self._library.trt.__version__
        return exact.partition(".")[0] if self._version_compatible else exact

    def for_target(self, target: str) -> TensorRT:
        """The same for other GPUs than this machine's: `sm89`, or several as `sm80,sm89`.
        Raises InvalidModel."""
        words = target.lower().replace(" ", "")
        if not self._library.is_rtx or not _TARGETS.fullmatch(words):
            raise InvalidModel(
                "engine_target_unsupported",
                f"Expected targets of tensorrt-rtx such as sm89 or sm80,sm89, got {target!r} of "
                f"{self.name}; TensorRT builds on a machine with the GPU itself.",
            )
        settings = self._settings.model_copy(update={"target": words})
        return TensorRT(self.name, settings, self._machine_cache)

    def fingerprint(self) -> dict[str, object]:
        """Of an engine for TensorRT-RTX the same wherever it is built. Raises
        PipelineError("device_missing") where it depends on this machine's GPU and there is none."""
        common = {
            "os": platform.system(),
            "architecture": platform.machine(),
            "cuda": _cuda_major(self.name),
            "workspace_bytes": self._settings.workspace_bytes,
        }
        if self._library.is_rtx:
            return common | {"targets": list(self._targets())}
        return common | {
            "device": self._device_key(open_cuda().device()),
            "hardware_compatibility": self._settings.hardware_compatibility,
            "version_compatible": self._version_compatible,
            "optimization_level": self._settings.optimization_level,
        }

    def compile(self, model: Path, profile: Profile, into: Path) -> None:
        """TensorRT needs the GPU for it; TensorRT-RTX only to find out which it is."""
        from pipelines.engines.build_log import compiling  # not at the top: see cache.py
        from pipelines.engines.tensorrt_build import build_plan

        with compiling(into, backend=self.name, buckets=profile.buckets) as facts:
            if self._library.is_rtx:
                facts["targets"] = targets = self._targets()
                plan = build_plan(self._library, model, profile, self._settings, targets=targets)
            else:
                cuda = open_cuda()
                facts["device"] = device = cuda.device()
                timings = self._timings(device)
                with cuda.working():
                    plan = build_plan(
                        self._library, model, profile, self._settings, timings=timings
                    )
            (into / PLAN_FILE).write_bytes(plan)

    def validity(self, artefact: Path) -> Validity:
        """Whether `load` would take it here, as far as can be told without loading."""
        runtime = started(self._library, "Runtime")
        with (artefact / PLAN_FILE).open("rb") as plan:
            return validity_of(self._library, runtime, plan)

    def load(self, artefact: Path, *, threads: int) -> Engine:
        """Runs each bucket once on each slot: all that a first run makes is made. threads: one anyway."""
        return load_plan(
            self._library,
            open_cuda(),
            artefact / PLAN_FILE,
            slots=self._settings.slots,
            machine_cache=self._machine_cache,
            host_code=self._version_compatible,
        )

    def _targets(self) -> tuple[int, ...]:
        if self._chosen_targets:
            return self._chosen_targets
        target = open_cuda().device().compute_capability
        self._refuse_unknown((target,))
        return (target,)

    def _refuse_unknown(self, targets: tuple[int, ...]) -> None:
        """targets: of TensorRT-RTX; the classic library has none."""
        if not targets:
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
        match self._settings.hardware_compatibility:
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

    def _timings(self, device: Device) -> Entry | None:
        if self._machine_cache is None:
            return None
        return self._machine_cache.entry("timings", self._library.trt.__version__, device)


def _numbers(targets: str) -> tuple[int, ...]:
    """Compute capabilities, ascending: 80 and 89 of `sm89,sm80`."""
    return tuple(sorted({int(number) for number in re.findall(r"\d+", targets)}))


def _cuda_major(name: str) -> int | None:
    """Which CUDA the library was made for, by the wheel that it came in; None if it came in another way."""
    for major in _CUDA_MAJORS:
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{name}-cu{major}-bindings")
            return major
    return None
