"""Engines on the CPU, by OpenVINO: the throughput where fewer bits than float32 are allowed.

`compile` writes the compiled model as OpenVINO exports it, and beside it what the ONNX file calls its
inputs and outputs: the export has names of its own among them. OpenVINO's own cache stays off: it
knows a model by path, size and time, and answers with old weights where only those differ.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from infra.machine import available_cpus
from pipelines.engines.cpu import cpu_fingerprint, is_out_of_memory
from pipelines.engines.engine import Array, Arrays, DeviceOutOfMemory, Engine, Profile
from pipelines.engines.openvino_graph import Tensor, last_line, read_graph
from schemas.errors import InferenceFailed, InvalidModel, PipelineError
from schemas.models import Precision

BLOB_FILE = "model.blob"
SIGNATURE_FILE = "signature.json"

_HINTS: dict[Precision, str] = {"float32": "f32", "int8": "f32", "bfloat16": "bf16"}
"""Of what the graph has in float32; that of int8 has most of it in 8 bits already."""

_PACKED = 2
"""OpenVINO keeps weights as they were exported and once more as its kernels want them: 1.6 to 2.3
times the file was measured."""

_INT32 = np.iinfo(np.int32)


class Signature(Struct, frozen=True):
    """Inputs and outputs in the order of the compiled model."""

    precision: Precision
    inputs: list[Tensor]
    outputs: list[Tensor]


class OpenVino:
    """The backend. Made once per process; imports the vendor's library, opens no device."""

    name = "openvino"

    def __init__(self) -> None:
        """Raises PipelineError("backend_missing")."""
        self._ov = _import_silently()
        self._core = self._ov.Core()
        self.version: str = self._ov.__version__

    def fingerprint(self) -> dict[str, object]:
        return cpu_fingerprint()

    def compile(self, model: Path, profile: Profile, into: Path) -> None:
        """Any shape fits what is written, so buckets and ranges are not looked at."""
        from pipelines.engines.build_log import compiling  # not at the top: see cache.py

        self._expect_precision(profile.precision)
        with compiling(into, backend=self.name, precision=profile.precision) as facts:
            self._save_compiled(model, profile.precision, into, facts)
            self.load(into, threads=1).close()

    def _save_compiled(
        self, model: Path, precision: Precision, into: Path, facts: dict[str, object]
    ) -> None:
        graph, inputs, outputs = read_graph(self._core, model)
        try:
            compiled = self._core.compile_model(graph, "CPU", _precision(precision))
            blob = compiled.export_model().getbuffer()
        except Exception as error:
            raise _translated(error, "engine_build_failed", f"compiling {model.name}") from error
        facts["nodes"] = len(graph.get_ops())
        facts["optimised_nodes"] = len(compiled.get_runtime_model().get_ops())
        signature = Signature(precision, inputs, outputs)
        (into / BLOB_FILE).write_bytes(blob)
        (into / SIGNATURE_FILE).write_bytes(msgspec.json.encode(signature))

    def load(self, artefact: Path, *, threads: int) -> Engine:
        """threads: every CPU anyway, since runs take turns (see OpenVinoEngine)."""
        signature = _read_signature(artefact)
        options = {
            **_precision(signature.precision),
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(available_cpus()),
            "ENABLE_CPU_PINNING": "NO",  # the next process would be pinned to the same cores
        }

        def open_request() -> Any:
            try:
                blob = (artefact / BLOB_FILE).read_bytes()
                return self._core.import_model(blob, "CPU", options).create_infer_request()
            except Exception as error:
                raise _translated(error, "engine_unusable", "loading its artefact") from error

        size_bytes = sum(path.stat().st_size for path in artefact.iterdir())
        return OpenVinoEngine(open_request, signature, size_bytes * _PACKED)

    def _expect_precision(self, precision: Precision) -> None:
        if precision != "bfloat16":
            return
        if "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise InvalidModel(
                "precision_unsupported",
                "Expected a CPU that computes in bfloat16, this one does not; say `precision: float32`"
                " or use machines with AVX512-BF16, AMX or Arm's BF16.",
            )


class OpenVinoEngine(Engine):
    """One request, so one run at a time; others wait their turn.

    After a run that failed, OpenVINO may fail the next ones too, or answer them wrongly: shapes of
    the failed one stay behind, in whichever stream ran it. So the model is loaded anew then, and
    nothing runs beside it that could have met its stream.
    """

    def __init__(
        self, open_request: Callable[[], Any], signature: Signature, memory_bytes: int
    ) -> None:
        super().__init__(
            [tensor.spec() for tensor in signature.inputs],
            [tensor.spec() for tensor in signature.outputs],
            memory_bytes,
        )
        self._input_names = [tensor.name for tensor in signature.inputs]
        self._output_names = [tensor.name for tensor in signature.outputs]
        self._open_request = open_request
        self._turn = threading.Lock()
        self._request: Any = open_request()

    def _run(self, inputs: Arrays) -> dict[str, Array]:
        for name, array in inputs.items():
            _expect_32_bits(name, array)
        with self._turn:
            request = self._open_request() if self._request is None else self._request
            self._request = None
            arrays = self._infer(request, inputs)
            self._request = request
        return dict(zip(self._output_names, arrays, strict=True))

    def _infer(self, request: Any, inputs: Arrays) -> list[Array]:
        try:
            # `infer` does not tell when a run on a single thread fails, and gives empty or old arrays.
            request.start_async([inputs[name] for name in self._input_names])
            request.wait()
            return [tensor.data.copy() for tensor in request.output_tensors]
        except Exception as error:
            if is_out_of_memory(error):
                raise _no_room("running a batch", error) from error
            came = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            raise InferenceFailed(
                "engine_failed",
                f"Expected the model to run on {came}, OpenVINO says: {last_line(error)}; "
                "check the shapes that preprocessing makes against the model.",
            ) from error

    def _close(self) -> None:
        self._request = None


def _import_silently() -> ModuleType:
    """Import openvino without its converter of models, which tells its vendor of every import and
    writes into the home folder. That it may be missing is foreseen."""
    converter = "openvino.tools.ovc"
    unwanted = converter not in sys.modules
    if unwanted:
        sys.modules[converter] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        raise PipelineError(
            "backend_missing",
            f"Expected the library of the backend openvino, got: {error}; "
            "install 'headrace[openvino]'.",
        ) from error
    finally:
        if unwanted:
            del sys.modules[converter]


def _precision(precision: Precision) -> dict[str, str]:
    """By default OpenVINO takes bfloat16 where the CPU has it."""
    return {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": _HINTS[precision]}


def _read_signature(artefact: Path) -> Signature:
    try:
        return msgspec.json.decode((artefact / SIGNATURE_FILE).read_bytes(), type=Signature)
    except (OSError, msgspec.DecodeError) as error:
        raise _translated(error, "engine_unusable", "loading its artefact") from error


def _expect_32_bits(name: str, array: Array) -> None:
    """On the CPU, OpenVINO computes every integer in 32 bits, and cuts off what is longer."""
    if array.dtype.kind in "iu" and not np.can_cast(array.dtype, np.int32) and array.size:
        low, high = array.min(), array.max()
        if low < _INT32.min or high > _INT32.max:
            raise InferenceFailed(
                "engine_failed",
                f"Expected integers of 32 bits for input {name!r}, in which OpenVINO computes, got"
                f" {low} to {high}; use the backend onnxruntime.",
            )


def _translated(error: Exception, code: str, doing: str) -> PipelineError:
    if is_out_of_memory(error):
        return _no_room(doing, error)
    return InvalidModel(
        code,
        f"Expected {doing} to succeed, OpenVINO says: {last_line(error)}; "
        "export the graph with other operators, or use the backend onnxruntime.",
    )


def _no_room(doing: str, error: Exception) -> DeviceOutOfMemory:
    return DeviceOutOfMemory(
        f"Expected enough memory for {doing}, OpenVINO says: {last_line(error)}; "
        "use smaller buckets, fewer executors or a larger machine."
    )
