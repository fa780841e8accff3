"""CUDA by cuda-bindings, the vendor's own wheel: needs no compiler to install."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda.bindings import driver

from pipelines.engines.cuda import Bytes, Cuda, Device, failure


class CudaBindings(Cuda):
    """Raises RuntimeError where there is no driver."""

    def __init__(self) -> None:
        _call("cuInit", 0)
        self._device = _call("cuDeviceGet", 0)
        self._context: Any = None
        self._events: dict[int, Any] = {}

    def device(self) -> Device:
        attributes = driver.CUdevice_attribute
        major = attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        return Device(
            name=_call("cuDeviceGetName", 256, self._device).rstrip(b"\0").decode(),
            compute_capability=10 * _call("cuDeviceGetAttribute", major, self._device)
            + _call("cuDeviceGetAttribute", minor, self._device),
            memory_bytes=_call("cuDeviceTotalMem", self._device),
            driver=_call("cuDriverGetVersion"),
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        if self._context is None:  # twice at once is harmless: it is counted, and never given back
            self._context = _call("cuDevicePrimaryCtxRetain", self._device)
        _call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent")

    def allocate(self, size_bytes: int) -> int:
        return int(_call("cuMemAlloc", size_bytes))

    def free(self, pointer: int) -> None:
        _call("cuMemFree", pointer)

    def pinned(self, size_bytes: int) -> Bytes:
        address = int(_call("cuMemHostAlloc", size_bytes, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        _call("cuMemFreeHost", memory.ctypes.data)

    def new_stream(self) -> int:
        stream = int(_call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        flags = driver.CUevent_flags
        blocking = flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value
        self._events[stream] = _call("cuEventCreate", blocking)
        return stream

    def free_stream(self, stream: int) -> None:
        _call("cuEventDestroy", self._events.pop(stream))
        _call("cuStreamDestroy", stream)

    def copy_in(self, pointer: int, memory: Bytes, stream: int) -> None:
        _call("cuMemcpyHtoDAsync", pointer, memory.ctypes.data, memory.size, stream)

    def copy_out(self, memory: Bytes, pointer: int, stream: int) -> None:
        _call("cuMemcpyDtoHAsync", memory.ctypes.data, pointer, memory.size, stream)

    def wait(self, stream: int) -> None:
        _call("cuEventRecord", self._events[stream], stream)
        _call("cuEventSynchronize", self._events[stream])


def _call(name: str, *arguments: Any) -> Any:
    """What the call returns beside its status."""
    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise failure(name, status.name)
    return results[0] if results else None
