"""Engines on the CPU, by ONNX Runtime.

`compile` optimises the graph once and saves it with its weights already packed for this CPU, so
that `load` only maps files: tens of milliseconds instead of hundreds. The answers stay bitwise the
same. What is packed fits one instruction set, hence the fingerprint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.engines.cpu import cpu_fingerprint, is_out_of_memory
from pipelines.engines.engine import Array, Arrays, DeviceOutOfMemory, Engine, Profile, TensorSpec
from pipelines.engines.operators import unsupported_operators
from schemas.errors import InferenceFailed, InvalidModel, PipelineError, Transient

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "weights.bin"
CPU = "CPUExecutionProvider"

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(string)": np.dtype(object),
}

_FATAL = 4  # errors come as exceptions; the library would print each a second time
_OUT_OF_DEVICE_MEMORY = ("out of memory", "ALLOC_FAILED", "smaller than requested bytes")
_DISK_FULL = ("Failed to write external initializers", "Protobuf serialization failed")
UNSUPPORTED = re.compile(
    r"No Op registered for \w+"
    r"|Op registered for \w+ is deprecated"
    r"|\S+ is not a registered function/op"
    r"|NOT_IMPLEMENTED : (.*?\w+\(\d+\)|.*)"
)
"""In the words of ONNX Runtime and onnx.checker, up to the operator's name: what follows may be the node's, which
often has names of others in it."""


class OnnxRuntime:
    """The backend. Made once per process; imports the vendor's library, opens no device."""

    name = "onnxruntime"

    def __init__(self) -> None:
        self._ort = import_onnxruntime()
        self.version: str = self._ort.__version__

    def fingerprint(self) -> dict[str, object]:
        return {"build": self._ort.get_build_info(), **cpu_fingerprint()}

    def compile(self, model: Path, profile: Profile, into: Path) -> None:
        """Any shape fits what is written, so the profile is not looked at."""
        from pipelines.engines.build_log import compiling  # not at the top: see cache.py

        with compiling(into, backend=self.name) as facts:
            optimised_nodes = self._save_optimised(model, into)
            facts |= {"nodes": len(_read(model).graph.node), "optimised_nodes": optimised_nodes}
            self.load(into, threads=1).close()

    def _save_optimised(self, model: Path, into: Path) -> int:
        """Returns how many nodes it has: for people, so without those inside of branches and loops."""
        options = session_options(threads=1)
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(into / MODEL_FILE)
        for key, value in {
            "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
            "session.save_external_prepacked_constant_initializers": "1",
        }.items():
            options.add_session_config_entry(key, value)
        session = open_session(model, options, [CPU])
        saved = _read(into / MODEL_FILE)
        if _drop_dangling_inputs(saved, {spec.name for spec in session.get_inputs()}):
            (into / MODEL_FILE).write_bytes(saved.SerializeToString())
        return len(saved.graph.node)

    def load(self, artefact: Path, *, threads: int) -> Engine:
        options = session_options(threads)
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_session(artefact / MODEL_FILE, options, [CPU])
        size_bytes = sum(path.stat().st_size for path in artefact.iterdir())
        return OnnxRuntimeEngine(session, size_bytes)


class OnnxRuntimeEngine(Engine):
    """One session, which any number of threads run at once, each on its own thread."""

    def __init__(self, session: Any, memory_bytes: int) -> None:
        super().__init__(
            [_spec(arg) for arg in session.get_inputs()],
            [_spec(arg) for arg in session.get_outputs()],
            memory_bytes,
        )
        self._session = session
        self._output_names = [spec.name for spec in self.outputs]

    def _run(self, inputs: Arrays) -> dict[str, Array]:
        try:
            arrays = self._session.run(self._output_names, dict(inputs))
        except Exception as error:
            if _has_no_room(error):
                raise DeviceOutOfMemory(_no_room("running a batch", error)) from error
            came = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            raise InferenceFailed(
                "engine_failed",
                f"Expected the model to run on {came}, ONNX Runtime says: {error}; "
                "check the shapes that preprocessing makes against the model.",
            ) from error
        return dict(zip(self._output_names, arrays, strict=True))

    def _close(self) -> None:
        self._session = None


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime without its telemetry: since 1.29 it uploads by default on every system,
    and only this variable, set before the first import, stops it altogether."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime  # type: ignore[no-any-return]


def open_unchanged(model: Path) -> Engine:
    """An ONNX file on the CPU, in the precision it was exported in. Raises InvalidModel."""
    session = open_session(model, session_options(threads=1), [CPU])
    return OnnxRuntimeEngine(session, model.stat().st_size)


def session_options(threads: int) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(model: Path, options: Any, providers: Sequence[object]) -> Any:
    """providers: in the order of preference, as the library takes them. Raises InvalidModel,
    DeviceOutOfMemory, and Transient("disk_full") where the options say to write."""
    try:
        return import_onnxruntime().InferenceSession(
            str(model), options, providers=providers, enable_fallback=0
        )
    except Exception as error:
        raise _translated(error, model) from error


def _read(model: Path) -> ModelProto:
    """An ONNX file that is one, without what lies in others."""
    import onnx

    return onnx.load(model, load_external_data=False)


def _drop_dangling_inputs(saved: ModelProto, names: set[str]) -> bool:
    """Take from the saved graph the inputs that are none. Whether there were any.

    Older models list each weight among the inputs. The optimiser folds weights away but leaves them
    listed, and the saved graph would then ask for them.
    """
    inputs = [value for value in saved.graph.input if value.name in names]
    if len(inputs) == len(saved.graph.input):
        return False
    del saved.graph.input[:]
    saved.graph.input.extend(inputs)
    return True


def _spec(arg: Any) -> TensorSpec:
    if arg.type not in _DTYPES:
        raise InvalidModel(
            "unsupported_tensor_type",
            f"Expected tensors of {', '.join(sorted(_DTYPES))}, {arg.name!r} is {arg.type}; "
            "export the model with plain tensors as inputs and outputs.",
        )
    shape = tuple(axis if isinstance(axis, int) else None for axis in arg.shape)
    return TensorSpec(arg.name, _DTYPES[arg.type], shape or None)  # unknown rank comes as ()


def _translated(error: Exception, model: Path) -> PipelineError:
    if _has_no_room(error):
        return DeviceOutOfMemory(_no_room(f"loading {model.name}", error))
    if _says(_DISK_FULL, error):
        return Transient(
            "disk_full",
            f"Expected room on disk for the compiled {model.name}, ONNX Runtime says: {error}; "
            "free some space or give the engine cache another folder.",
        )
    if unsupported := UNSUPPORTED.search(str(error)):
        return unsupported_operators(model, "ONNX Runtime", unsupported[0])
    return InvalidModel(
        "unusable_onnx",
        f"Expected an ONNX model that ONNX Runtime can load, for {model.name} it says: {error}; "
        "check the file with onnx.checker, its opset and its external data.",
    )


def _has_no_room(error: Exception) -> bool:
    return is_out_of_memory(error) or _says(_OUT_OF_DEVICE_MEMORY, error)


def _says(phrases: tuple[str, ...], error: Exception) -> bool:
    return any(phrase in str(error) for phrase in phrases)


def _no_room(doing: str, error: Exception) -> str:
    return (
        f"Expected enough memory for {doing}, ONNX Runtime says: {error}; "
        "use smaller buckets, fewer executors or a larger machine."
    )
