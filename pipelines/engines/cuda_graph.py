"""CUDA graphs by the driver itself, because pycuda has none: what is put on a stream for each batch is
recorded once and launched as a whole, in one call instead of one per kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int, c_uint, c_ulonglong, c_void_p

_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may call CUDA meanwhile, such as to allocate."""

_SIGNATURES = {
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGetErrorName": (c_uint, c_void_p),
}


class Graphs:
    """failure: makes an error of a call's name and of CUDA's name for what went wrong."""

    def __init__(self, failure: Callable[[str, str], Exception]) -> None:
        """Raises OSError where there is no driver."""
        self._failure = failure
        self._driver = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            getattr(self._driver, name).argtypes = arguments

    def capture(self, work: Callable[[], None], stream: int) -> int:
        self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        recorded, graph = c_void_p(), c_void_p()
        try:
            work()
        except BaseException:
            self._driver.cuStreamEndCapture(stream, byref(recorded))  # or the stream is of no use
            self._driver.cuGraphDestroy(recorded)
            raise
        self._call("cuStreamEndCapture", stream, byref(recorded))
        try:
            self._call("cuGraphInstantiateWithFlags", byref(graph), recorded, 0)
        finally:
            self._driver.cuGraphDestroy(recorded)
        return graph.value or 0

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def free(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._driver, name)(*arguments):
            error = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, byref(error))
            raise self._failure(name, (error.value or b"an unknown error").decode())
