"""The backends by name. A library is imported when a model first asks for its backend."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipelines.engines.engine import Backend
from pipelines.engines.precision import PRECISIONS
from schemas.errors import InvalidModel

if TYPE_CHECKING:
    from infra.settings import TensorRTSettings
    from pipelines.engines.machine_cache import MachineCache


class Backends:
    """One of each, as the deployment wants them."""

    def __init__(
        self,
        tensorrt: TensorRTSettings | None = None,
        machine_cache: MachineCache | None = None,
    ) -> None:
        self._tensorrt = tensorrt
        self._machine_cache = machine_cache
        self._making = threading.Lock()
        self._made: dict[str, Backend] = {}

    def get(self, name: str, target: str | None = None) -> Backend:
        """target: a device other than this machine's, in the backend's words.

        Raises InvalidModel (unknown_backend, engine_target_unsupported) and
        PipelineError("backend_missing").
        """
        with self._making:
            if name not in self._made:
                self._made[name] = self._make(name)
            backend = self._made[name]
        return backend if target is None else _for_target(backend, target)

    def _make(self, name: str) -> Backend:
        if name == "onnxruntime":
            from pipelines.engines.onnxruntime import OnnxRuntime

            return OnnxRuntime()
        if name == "onnxruntime-cuda":
            from pipelines.engines.onnxruntime_cuda import OnnxRuntimeCuda

            return OnnxRuntimeCuda()
        if name == "openvino":
            from pipelines.engines.openvino import OpenVino

            return OpenVino()
        if name in ("tensorrt", "tensorrt-rtx"):
            from pipelines.engines.tensorrt import TensorRT

            return TensorRT(name, self._tensorrt, self._machine_cache)
        raise InvalidModel(
            "unknown_backend",
            f"Expected {', '.join(PRECISIONS)}, got {name!r}; name one of them as `backend` in"
            " model.yaml, or after --backend.",
        )


@runtime_checkable
class CrossBackend(Protocol):
    """A backend that compiles for devices other than this machine's."""

    def for_target(self, target: str) -> Backend:
        """The same for this device, which its fingerprint names. Raises InvalidModel."""


def _for_target(backend: Backend, target: str) -> Backend:
    if isinstance(backend, CrossBackend):
        return backend.for_target(target)
    raise InvalidModel(
        "engine_target_unsupported",
        f"Expected a backend that compiles for other devices, {backend.name} compiles for the machine"
        f" it runs on, not for {target!r}; build there, without a target.",
    )
