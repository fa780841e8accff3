"""Engines on NVIDIA GPUs, by ONNX Runtime's CUDA provider: for models that TensorRT does not take.

The artefact is the graph as it is, its weights in one file. What ONNX Runtime optimises for a GPU
cannot be saved: it writes copies between devices into the graph that it refuses to load again
(onnxruntime#11348), and what it optimises for the CPU casts half precision away. So it is optimised
for the GPU each time it is loaded, and an artefact fits any of them.
"""

from __future__ import annotations

import contextlib
import io
import platform
import re
from pathlib import Path

from infra.logs import get_logger
from pipelines.engines.engine import Array, Arrays, Engine, Profile
from pipelines.engines.onnxruntime import (
    CPU,
    MODEL_FILE,
    UNSUPPORTED,
    WEIGHTS_FILE,
    OnnxRuntimeEngine,
    import_onnxruntime,
    open_session,
    session_options,
)
from pipelines.engines.operators import unsupported_operators
from schemas.errors import DEVICE_FAILED, InferenceFailed, InvalidModel, PipelineError, Transient

CUDA = "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "use_tf32": "0",  # float32 would be multiplied with 10 bits of its fraction
    "arena_extend_strategy": "kSameAsRequested",  # several engines share the device
    "cudnn_conv_algo_search": "HEURISTIC",  # by default each new shape waits for a search
}

_DEVICE_FAILED = re.compile(
    r"CUDA failure (46|214|220|700|702|709|71[0-9]|72[01]|999)\b"
    r"|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)
"""Errors after which every call of the process fails, such as an illegal access; cuBLAS and cuDNN do not say
which one it was. Others are about the batch, or about a machine that has no device to work with."""

_NO_DEVICE = re.compile(r"(CUDA|CUBLAS|CUDNN) failure")

_log = get_logger("engines.onnxruntime")


class CudaEngine(OnnxRuntimeEngine):
    """Raises Transient("device_failed") for a run that failed because of the device."""

    def _run(self, inputs: Arrays) -> dict[str, Array]:
        try:
            return super()._run(inputs)
        except InferenceFailed as error:
            _raise_if_device_failed(error)
            raise


class OnnxRuntimeCuda:
    """The backend. Made once per process; compiles on any machine, needs the GPU to load."""

    name = "onnxruntime-cuda"

    def __init__(self) -> None:
        self._ort = import_onnxruntime()
        self.version: str = self._ort.__version__

    def fingerprint(self) -> dict[str, object]:
        """The same on every machine of a kind: the artefact depends on no device."""
        return {"os": platform.system(), "architecture": platform.machine()}

    def compile(self, model: Path, profile: Profile, into: Path) -> None:
        """Any shape fits what is written, so the profile is not looked at."""
        import onnx

        from pipelines.engines.build_log import compiling  # not at the top: see cache.py

        try:
            onnx.checker.check_model(str(model))
            proto = onnx.load(str(model))
        except Exception as error:  # protobuf's own DecodeError, whichever implementation is in use
            if unsupported := UNSUPPORTED.search(str(error)):
                raise unsupported_operators(model, "ONNX", unsupported[0]) from error
            raise InvalidModel(
                "unusable_onnx",
                f"Expected an ONNX model, of {model.name} onnx.checker says: {error}; export it anew.",
            ) from error
        with compiling(into, backend=self.name, nodes=len(proto.graph.node)):
            path = str(into / MODEL_FILE)
            onnx.save(proto, path, save_as_external_data=True, location=WEIGHTS_FILE)

    def load(self, artefact: Path, *, threads: int) -> Engine:
        """threads: for the few operators that stay on the CPU.

        Raises PipelineError("backend_missing" or "device_missing") where the CUDA provider is not
        there or does not start: ONNX Runtime would take the CPU instead, and not say so; and
        Transient("device_failed").
        """
        self._expect_provider()
        providers = [(CUDA, CUDA_OPTIONS), CPU]
        try:
            session = open_session(artefact / MODEL_FILE, session_options(threads), providers)
        except InvalidModel as error:
            _raise_if_device_failed(error)
            if not _NO_DEVICE.search(error.message):
                raise
            raise PipelineError(
                "device_missing",
                f"Expected a GPU that ONNX Runtime can use, {error.message} Look after its driver.",
            ) from error
        if CUDA not in session.get_providers():
            raise PipelineError(
                "device_missing",
                "Expected ONNX Runtime's CUDA provider to start, it did not; see that the machine has"
                " an NVIDIA GPU with its driver, and CUDA and cuDNN as"
                " `pip install 'onnxruntime-gpu[cuda,cudnn]'` brings them.",
            )
        size_bytes = sum(path.stat().st_size for path in artefact.iterdir())
        return CudaEngine(session, size_bytes)

    def _expect_provider(self) -> None:
        available = self._ort.get_available_providers()
        if CUDA not in available:
            raise PipelineError(
                "backend_missing",
                f"Expected ONNX Runtime with {CUDA}, this one has {', '.join(available)}; "
                "install `onnxruntime-gpu` in the place of `onnxruntime`: one removes the other's files.",
            )
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self._ort.preload_dlls()  # finds the libraries that pip installs; prints what it misses
        if said.getvalue():
            _log.warning("cuda_libraries_missing", message=said.getvalue().strip())


def _raise_if_device_failed(error: PipelineError) -> None:
    """Raises Transient("device_failed")."""
    if _DEVICE_FAILED.search(error.message):
        raise Transient(
            DEVICE_FAILED,
            f"Expected the GPU to work, {error.message} If it comes again, restart the worker and"
            " look at the GPU with nvidia-smi.",
        ) from error
