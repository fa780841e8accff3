"""The vendor's library: TensorRT or TensorRT-RTX, whose names are the same, and what it says.

Its calls answer None or False, and the reason goes to a logger.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from infra.logs import get_logger
from pipelines.engines.engine import DeviceOutOfMemory
from schemas.errors import PipelineError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST = (10, 16)
"""Of the classic library."""

_OUT_OF_MEMORY = (
    *("out of memory", "outofmemory", "out_of_memory", "insufficient memory"),
    *("bad_alloc", "alloc_failed", "errormemoryallocation"),
)
"""In the words of TensorRT, of CUDA's driver and runtime, of cuBLAS and cuDNN, and of C++."""

_REMEDIES = {
    "engine_build_failed": "raise HEADRACE_ENGINES__TENSORRT__WORKSPACE_BYTES where it is set, export the"
    " graph with other operators, or use the backend onnxruntime",
    "engine_unusable": "build it again on this machine (`headrace engines build --force`), or update a"
    " driver that is older than its builder's",
    "engine_failed": "check the shapes that preprocessing makes against the model",
    "device_missing": "see with nvidia-smi that the GPU is there, and its driver as new as the"
    " library's CUDA",
}
"""By code, what to do."""

_log = get_logger("engines.tensorrt")
_loggers: list[Any] = []
"""For good: a library goes on calling the first one it was given, whoever else drops it."""

_listeners: dict[int, list[str]] = {}


class Library(NamedTuple):
    """trt: the module. logger: the one of the process, a second would be ignored. is_rtx: TensorRT-RTX
    chooses kernels for any number of GPUs when it builds, and compiles them for this one when it loads."""

    trt: Any
    logger: Any
    is_rtx: bool


@functools.cache
def import_library(name: str) -> Library:
    """name: of the backend. Raises PipelineError("backend_missing")."""
    try:
        trt = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        raise PipelineError(
            "backend_missing",
            f"Expected the library of the backend {name}, got: {error}; "
            f"install 'headrace[{name}]'.",
        ) from error
    is_rtx = name == "tensorrt-rtx"
    if not is_rtx and tuple(map(int, trt.__version__.split(".")[:2])) < OLDEST:
        raise PipelineError(
            "backend_missing",
            f"Expected TensorRT {OLDEST[0]}.{OLDEST[1]} or newer, came {trt.__version__}; "
            f"install 'headrace[{name}]'.",
        )
    return Library(trt, _logger(trt), is_rtx)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            _hear(severity.name, message)

    _loggers.append(Logger())
    return _loggers[-1]


def _hear(severity: str, message: str) -> None:
    match severity:
        case "ERROR" | "INTERNAL_ERROR":
            _log.error("tensorrt_says", message=message)
            for listener in list(_listeners.values()):
                listener.append(message)
        case "WARNING":
            _log.warning("tensorrt_says", message=message)
        case "INFO" if message.strip("-"):  # it draws lines too
            from pipelines.engines.build_log import tell  # not at the top: see cache.py

            tell("tensorrt_says", message=message)
        case _:
            _log.debug("tensorrt_says", severity=severity, message=message)


@contextmanager
def errors() -> Iterator[list[str]]:
    """Gives the errors logged since the block began, whatever thread logs: builders have threads of
    their own. Of two blocks at once each may get the other's too."""
    said: list[str] = []
    _listeners[id(said)] = said
    try:
        yield said
    finally:
        del _listeners[id(said)]


def started(library: Library, name: str) -> Any:
    """A Builder or a Runtime. Raises PipelineError("device_missing") where the library does not start, as with
    a driver older than its CUDA; DeviceOutOfMemory."""
    with errors() as said:
        try:
            made = getattr(library.trt, name)(library.logger)
        except TypeError:  # of pybind11, for a constructor that answers nothing
            made = None
        doing = f"starting the {name} of {library.trt.__name__} {library.trt.__version__}"
        return checked(made, doing, said, PipelineError, "device_missing")


def checked(answer: Any, doing: str, said: list[str], error: type[PipelineError], code: str) -> Any:
    """The answer of a call; if it is None or False, the call failed.

    Raises DeviceOutOfMemory if that is why, else `error` with the code, which is one of _REMEDIES.
    """
    if answer is not None and answer is not False:
        return answer
    reason = "; ".join(dict.fromkeys(said)) or "nothing about it"
    if any(phrase in reason.lower() for phrase in _OUT_OF_MEMORY):
        raise DeviceOutOfMemory(
            f"Expected enough memory on the GPU for {doing}, TensorRT says: {reason}; "
            "use smaller buckets, fewer slots or a larger GPU."
        )
    raise error(code, f"Expected {doing} to succeed, TensorRT says: {reason}; {_REMEDIES[code]}.")
