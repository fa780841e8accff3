"""CUDA by pycuda. Never its `autoinit` and `make_context`: a context of one's own breaks beside those
that torch and TensorRT use."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pycuda.driver as driver

from pipelines.engines.cuda import OUT_OF_MEMORY, Bytes, Cuda, Device, failure

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING, for which pycuda has no name: never waits for the default stream."""


class PyCuda(Cuda):
    """Keeps pycuda's objects by their addresses, because they end with their last reference."""

    def __init__(self) -> None:
        with _translated():
            driver.init()
            self._device = driver.Device(0)
        self._context: Any = None
        self._retaining = threading.Lock()
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, tuple[Any, Any]] = {}

    def device(self) -> Device:
        with _translated():
            major, minor = self._device.compute_capability()
            return Device(
                name=self._device.name(),
                compute_capability=10 * major + minor,
                memory_bytes=self._device.total_memory(),
                driver=driver.get_driver_version(),
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        with _translated():
            with self._retaining:  # pycuda takes what each call gives for a context of its own
                if self._context is None:
                    self._context = self._device.retain_primary_context()
                    atexit.register(self._context.detach)  # or pycuda complains at the end
            self._context.push()
        try:
            yield
        finally:
            with _translated():
                self._context.pop()

    def allocate(self, size_bytes: int) -> int:
        with _translated():
            memory = driver.mem_alloc(size_bytes)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        with _translated():
            self._memory.pop(pointer).free()

    def pinned(self, size_bytes: int) -> Bytes:
        with _translated():
            memory: Bytes = driver.pagelocked_empty(size_bytes, np.uint8)
            return memory

    def free_pinned(self, memory: Bytes) -> None:
        with _translated():
            memory.base.free()  # type: ignore[union-attr]

    def new_stream(self) -> int:
        flags = driver.event_flags
        with _translated():
            stream = driver.Stream(_NON_BLOCKING)
            done = driver.Event(flags.BLOCKING_SYNC | flags.DISABLE_TIMING)
        self._streams[stream.handle] = stream, done
        return int(stream.handle)

    def free_stream(self, stream: int) -> None:
        with _translated():
            del self._streams[stream]

    def copy_in(self, pointer: int, memory: Bytes, stream: int) -> None:
        with _translated():
            driver.memcpy_htod_async(pointer, memory, self._streams[stream][0])

    def copy_out(self, memory: Bytes, pointer: int, stream: int) -> None:
        with _translated():
            driver.memcpy_dtoh_async(memory, pointer, self._streams[stream][0])

    def wait(self, stream: int) -> None:
        on, done = self._streams[stream]
        with _translated():
            done.record(on)
            done.synchronize()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except driver.Error as error:
        call, _, reason = str(error).partition(" failed: ")
        is_memory = isinstance(error, driver.MemoryError)
        raise failure(call, OUT_OF_MEMORY if is_memory else reason) from error
