"""Runs a TensorRT plan: several slots, so that one batch is copied while another is computed.

    slot = stream + scratch memory + for each bucket a context with its buffers and its CUDA graph
    run  = rows into pinned memory → [copy in → compute → copy out] → wait → rows for the caller

What is in brackets goes to the device in one launch. A slot is one thread's for the length of a run;
the engine and its weights are shared by all slots.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

import numpy as np

from infra.logs import get_logger
from pipelines.engines.cuda import Cuda
from pipelines.engines.engine import Array, Arrays, DeviceOutOfMemory, Engine
from pipelines.engines.tensorrt_context import BucketContext
from pipelines.engines.tensorrt_tensors import Bucket, Tensors
from schemas.errors import InferenceFailed, Transient

_log = get_logger("engines.tensorrt")


class Loaded(NamedTuple):
    """runtime and engine: TensorRT's; the engine needs its runtime, contexts need their engine.
    scratch_bytes: that the largest bucket needs. new_context: for a bucket, on a stream, in scratch
    memory at an address."""

    runtime: Any
    engine: Any
    tensors: Tensors
    scratch_bytes: int
    new_context: Callable[[Bucket, int, int], BucketContext]


class Slot:
    """Raises DeviceOutOfMemory, and then holds nothing."""

    def __init__(self, cuda: Cuda, loaded: Loaded) -> None:
        with ExitStack() as made:
            stream = cuda.new_stream()
            made.callback(cuda.free_stream, stream)
            scratch = cuda.allocate(max(loaded.scratch_bytes, 1))
            made.callback(cuda.free, scratch)
            self._contexts: dict[int, BucketContext] = {}
            for bucket in reversed(loaded.tensors.buckets):  # what does not fit shows at once
                context = loaded.new_context(bucket, stream, scratch)
                made.callback(context.close)
                self._contexts[bucket.profile] = context
            self._made = made.pop_all()
        held = sum(context.memory_bytes for context in self._contexts.values())
        self.memory_bytes = loaded.scratch_bytes + held

    def run(self, bucket: Bucket, inputs: Arrays, rows: int) -> dict[str, Array]:
        return self._contexts[bucket.profile].run(inputs, rows)

    def close(self) -> None:
        self._contexts.clear()
        self._made.close()


class TensorRTEngine(Engine):
    """A batch runs in the smallest bucket that holds it, filled up with zeros; one beyond the largest
    bucket in several runs."""

    def __init__(self, cuda: Cuda, loaded: Loaded, slots: int, weights_bytes: int) -> None:
        """slots: at most; further ones than the first are left out where memory ends."""
        self._cuda = cuda
        self._loaded: Loaded | None = loaded
        self._tensors = loaded.tensors
        with cuda.active(), ExitStack() as made:
            self._slots = [
                made.enter_context(closing(slot)) for slot in _slots(cuda, loaded, slots)
            ]
            self._made = made.pop_all()
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        held = sum(slot.memory_bytes for slot in self._slots)
        super().__init__(loaded.tensors.inputs, loaded.tensors.outputs, weights_bytes + held)

    def _run(self, inputs: Arrays) -> dict[str, Array]:
        rows = self._rows(inputs)
        largest = self._tensors.buckets[-1].rows
        if rows is None or largest is None or rows <= largest:
            return self._run_part(inputs, rows)
        parts = [
            self._run_part(self._part(inputs, at, at + largest), min(largest, rows - at))
            for at in range(0, rows, largest)
        ]
        return {
            name: np.concatenate([part[name] for part in parts])
            if name in self._tensors.batched
            else array
            for name, array in parts[0].items()
        }

    def _run_part(self, inputs: Arrays, rows: int | None) -> dict[str, Array]:
        bucket = next(b for b in self._tensors.buckets if (b.rows or 0) >= (rows or 0))
        with self._slot() as slot, self._cuda.working():
            return slot.run(bucket, inputs, rows or 0)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)

    def _part(self, inputs: Arrays, start: int, stop: int) -> dict[str, Array]:
        batched = self._tensors.batched
        return {name: a[start:stop] if name in batched else a for name, a in inputs.items()}

    def _rows(self, inputs: Arrays) -> int | None:
        """The batch's size; None for a graph without a dynamic batch."""
        sizes = {name: len(a) for name, a in inputs.items() if name in self._tensors.batched}
        if len(set(sizes.values())) > 1:
            raise InferenceFailed(
                "wrong_engine_input",
                f"Expected inputs of one batch, got {sizes} rows; stack them in a preprocess step.",
            )
        return next(iter(sizes.values()), None)

    def _close(self) -> None:
        try:
            with self._cuda.active(), self._made:
                self._slots.clear()
        except Transient as error:  # the device failed: its memory goes with this process
            _log.warning("engine_not_freed", reason=error.message)
        self._loaded = None


def _slots(cuda: Cuda, loaded: Loaded, most: int) -> Iterator[Slot]:
    yield Slot(cuda, loaded)
    for number in range(1, most):
        try:
            yield Slot(cuda, loaded)
        except DeviceOutOfMemory as error:
            _log.warning("engine_slots_left_out", wanted=most, made=number, reason=error.message)
            return
