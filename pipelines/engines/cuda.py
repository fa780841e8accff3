"""CUDA as far as an executor needs it: device memory with pinned memory beside it, and streams.

Two libraries stand behind it, one module each: pycuda, and cuda-bindings where that is not
installed. Both use the device's primary context, which torch and TensorRT share, and it is pushed
in whatever thread does the work: a context of one's own breaks beside them.
"""

from __future__ import annotations

import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from pipelines.engines.cuda_graph import Graphs
from pipelines.engines.engine import Array, DeviceOutOfMemory
from schemas.errors import DEVICE_FAILED, PipelineError, Transient

Bytes = NDArray[np.uint8]

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

_LIBRARIES = {
    "pycuda": ("pipelines.engines.cuda_pycuda", "PyCuda"),
    "cuda-bindings": ("pipelines.engines.cuda_bindings", "CudaBindings"),
}


class Device(Struct, frozen=True):
    """compute_capability: 89 for 8.9. driver: the newest CUDA it can run, 13000 for 13.0."""

    name: str
    compute_capability: int
    memory_bytes: int
    driver: int


class Cuda(ABC):
    """The first visible device (CUDA_VISIBLE_DEVICES says which). Pointers and streams are integers,
    as TensorRT takes them. Every method but `device` is called within `active`.

    Raises DeviceOutOfMemory, or Transient("device_failed").
    """

    @abstractmethod
    def device(self) -> Device:
        """Opens no context."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """The primary context is this thread's for the length of the block."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> int: ...

    @abstractmethod
    def free(self, pointer: int) -> None: ...

    @abstractmethod
    def pinned(self, size_bytes: int) -> Bytes:
        """Memory of the host that the device copies from and to by itself, beside other work."""

    @abstractmethod
    def free_pinned(self, memory: Bytes) -> None:
        """No view of it may be used any longer."""

    @abstractmethod
    def new_stream(self) -> int: ...

    @abstractmethod
    def free_stream(self, stream: int) -> None: ...

    @abstractmethod
    def copy_in(self, pointer: int, memory: Bytes, stream: int) -> None: ...

    @abstractmethod
    def copy_out(self, memory: Bytes, pointer: int, stream: int) -> None: ...

    @abstractmethod
    def wait(self, stream: int) -> None:
        """Until all that was put on the stream is done. Sleeps, so that the core can decode meanwhile."""

    @contextmanager
    def working(self) -> Iterator[None]:
        """`active`, for calls of a library that puts the blame on the model or the batch: where they fail,
        the device is asked whether it was not itself. Raises Transient("device_failed") then."""
        with self.active():
            try:
                yield
            except PipelineError as error:
                if not isinstance(error, Transient):
                    self.check()
                raise

    def check(self) -> None:
        """Raises Transient("device_failed") if this process cannot use the device any longer, as after an
        illegal access in a kernel."""
        stream = self.new_stream()
        try:
            self.wait(stream)
        finally:
            self.free_stream(stream)

    @functools.cached_property
    def _graphs(self) -> Graphs:
        return Graphs(failure)

    def capture(self, work: Callable[[], None], stream: int) -> int:
        """Record what `work` puts on the stream instead of doing it. Returns the graph."""
        return self._graphs.capture(work, stream)

    def launch(self, graph: int, stream: int) -> None:
        self._graphs.launch(graph, stream)

    def free_graph(self, graph: int) -> None:
        self._graphs.free(graph)


class Buffer:
    """Memory on the device, and as much of it pinned on the host, for one tensor of any shape up to a
    size. Belongs to whoever made it, who frees it."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self.size_bytes = max(size_bytes, 1)  # TensorRT wants an address for an empty tensor too
        self._cuda = cuda
        self.pointer = cuda.allocate(self.size_bytes)
        try:
            self._host = cuda.pinned(self.size_bytes)
        except BaseException:
            cuda.free(self.pointer)
            raise
        self._host[:] = 0
        self._bytes = self._host
        self.array: Array = self._host

    def shape(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Make `array`, the host's side, a tensor of this shape; only so much is copied from now on."""
        self._bytes = self._host[: math.prod(shape) * dtype.itemsize]
        self.array = self._bytes.view(dtype).reshape(shape)
        return self.array

    def copy_in(self, stream: int) -> None:
        if self._bytes.size:
            self._cuda.copy_in(self.pointer, self._bytes, stream)

    def copy_out(self, stream: int) -> None:
        if self._bytes.size:
            self._cuda.copy_out(self._bytes, self.pointer, stream)

    def free(self) -> None:
        """No view of `array` may be used any longer."""
        self._cuda.free(self.pointer)
        self._cuda.free_pinned(self._host)


@functools.cache
def open_cuda() -> Cuda:
    """By pycuda, else by cuda-bindings. Raises PipelineError("device_missing") that says what is missing."""
    problems: list[str] = []
    for library, (module, name) in _LIBRARIES.items():
        try:
            cuda: Cuda = getattr(importlib.import_module(module), name)()
            cuda.device()
        except (ImportError, OSError, RuntimeError, PipelineError) as error:
            problems.append(f"{library}: {error}")
        else:
            return cuda
    raise PipelineError(
        "device_missing",
        f"Expected an NVIDIA GPU with its driver, and pycuda or cuda-bindings, got: "
        f"{'; '.join(problems)}; install 'headrace[cuda]' on a machine with a GPU.",
    )


def failure(call: str, error: str) -> PipelineError:
    """What a failed call raises. error: CUDA's name for it."""
    if error == OUT_OF_MEMORY:
        return DeviceOutOfMemory(
            f"Expected room on the GPU, {call} says {error}; "
            "use smaller buckets, fewer slots or a larger GPU."
        )
    return Transient(
        DEVICE_FAILED,
        f"Expected CUDA's {call} to succeed, got {error}; if it comes again, restart the worker "
        "and look at the GPU with nvidia-smi.",
    )
