"""One bucket on one slot: TensorRT's execution context, its buffers, and the CUDA graph of its run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from infra.logs import get_logger
from pipelines.engines.cuda import Buffer, Cuda
from pipelines.engines.engine import Array, Arrays, DeviceOutOfMemory, TensorSpec
from pipelines.engines.tensorrt_library import Library, checked, errors
from pipelines.engines.tensorrt_tensors import Bucket, Shape, Tensors
from schemas.errors import InferenceFailed, InvalidModel, PipelineError

_log = get_logger("engines.tensorrt")


class BucketContext:
    """Made, run and closed in the slot's turn only, within `Cuda.active`."""

    def __init__(
        self,
        library: Library,
        cuda: Cuda,
        context: Any,
        tensors: Tensors,
        bucket: Bucket,
        stream: int,
    ) -> None:
        """context: without a profile yet, its scratch memory set. Runs it once on zeros.

        Raises InvalidModel or DeviceOutOfMemory.
        """
        self._library = library
        self._cuda = cuda
        self._context = context
        self._tensors = tensors
        self._bucket = bucket
        self._stream = stream
        self._graph: int | None = None
        self._buffers: dict[str, Buffer] = {}
        with ExitStack() as made:
            made.callback(self._free)
            self._select_profile()
            self._make_buffers()
            self._enqueue()  # also makes what a first run makes, which must not be in the graph
            cuda.wait(stream)
            if bucket.fixed:
                self._graph = self._captured()
            if self._graph is not None:  # its first launch takes it to the device
                cuda.launch(self._graph, stream)
                cuda.wait(stream)
            made.pop_all()

    @property
    def memory_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in self._buffers.values())

    def run(self, inputs: Arrays, rows: int) -> dict[str, Array]:
        """rows: of the batch, at most the bucket's. Raises InferenceFailed or DeviceOutOfMemory."""
        for spec in self._tensors.inputs:
            self._put(spec, inputs[spec.name])
        if not self._bucket.fixed:
            self._shape_outputs(InferenceFailed)
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)
        self._cuda.wait(self._stream)
        return {spec.name: self._taken(spec, rows) for spec in self._tensors.outputs}

    def close(self) -> None:
        self._free()

    def _select_profile(self) -> None:
        with errors() as said:
            chosen = self._context.set_optimization_profile_async(
                self._bucket.profile, self._stream
            )
            checked(chosen, "choosing a profile", said, InvalidModel, "engine_unusable")
        self._cuda.wait(self._stream)

    def _make_buffers(self) -> None:
        for spec in self._tensors.inputs:
            shape = self._bucket.largest[spec.name]
            self._set_shape(spec, shape, InvalidModel)
            self._make_buffer(spec, shape)
        for spec, shape in self._output_shapes(InvalidModel):
            self._expect_batch(spec, shape)
            self._make_buffer(spec, shape)

    def _expect_batch(self, spec: TensorSpec, shape: Shape) -> None:
        if spec.name in self._tensors.batched and shape[0] != self._bucket.rows:
            raise InvalidModel(
                "dynamic_shape",
                f"Expected output {spec.name!r} with the batch of {self._bucket.rows} as its first "
                f"axis, got {list(shape)}; export the graph with one row of output for each of input.",
            )

    def _make_buffer(self, spec: TensorSpec, shape: Shape) -> None:
        buffer = Buffer(self._cuda, spec.dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        self._buffers[spec.name] = buffer
        buffer.shape(shape, spec.dtype)
        with errors() as said:
            taken = self._context.set_tensor_address(spec.name, buffer.pointer)
            checked(taken, f"giving {spec.name!r} memory", said, InvalidModel, "engine_unusable")

    def _put(self, spec: TensorSpec, array: Array) -> None:
        """Into pinned memory, filled up to the bucket's rows."""
        if not self._bucket.takes(spec.name, array.shape):
            bounds = self._bucket.smallest[spec.name][1:], self._bucket.largest[spec.name][1:]
            raise InferenceFailed(
                "wrong_engine_input",
                f"Expected items of {list(bounds[0])} to {list(bounds[1])} for input {spec.name!r}, "
                f"got {list(array.shape[1:])}; cut or pad them in a preprocess step, or widen "
                "`shapes` in model.yaml.",
            )
        shape = array.shape
        if spec.name in self._tensors.batched:
            shape = (self._bucket.largest[spec.name][0], *shape[1:])
        host = self._buffers[spec.name].shape(shape, spec.dtype)
        if shape == array.shape:
            host[...] = array
        else:
            host[: len(array)] = array
            host[len(array) :] = 0
        if not self._bucket.fixed:
            self._set_shape(spec, shape, InferenceFailed)

    def _set_shape(self, spec: TensorSpec, shape: Shape, error: type[PipelineError]) -> None:
        with errors() as said:
            taken = self._context.set_input_shape(spec.name, shape)
            checked(
                taken, f"giving {spec.name!r} the shape {list(shape)}", said, error, "engine_failed"
            )

    def _shape_outputs(self, error: type[PipelineError]) -> None:
        for spec, shape in self._output_shapes(error):
            self._buffers[spec.name].shape(shape, spec.dtype)

    def _output_shapes(self, error: type[PipelineError]) -> list[tuple[TensorSpec, Shape]]:
        """Of the inputs' shapes that are set."""
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as refused:
            raise error(
                "engine_failed",
                f"Expected inputs whose shapes fit each other, TensorRT says: {refused}; "
                "check the shapes that preprocessing makes against the model.",
            ) from refused
        shapes = [
            (spec, tuple(self._context.get_tensor_shape(spec.name)))
            for spec in self._tensors.outputs
        ]
        if missing or any(-1 in shape for _, shape in shapes):
            raise InvalidModel(
                "dynamic_shape",
                "Expected outputs whose shapes follow from those of the inputs, got "
                f"{ {spec.name: list(shape) for spec, shape in shapes} }; export the graph so that it "
                "fills them up to a fixed size.",
            )
        return shapes

    def _enqueue(self) -> None:
        for spec in self._tensors.inputs:
            self._buffers[spec.name].copy_in(self._stream)
        with errors() as said:
            done = self._context.execute_async_v3(self._stream)
            checked(done, "running a batch", said, InferenceFailed, "engine_failed")
        for spec in self._tensors.outputs:
            self._buffers[spec.name].copy_out(self._stream)

    def _captured(self) -> int | None:
        """The run as a graph; None where it cannot be one, such as with branches on the data."""
        known = self._library.is_rtx  # TensorRT finds out by trying
        try:
            if not known or self._context.is_stream_capturable(self._stream):
                return self._cuda.capture(self._enqueue, self._stream)
            reason = "the engine cannot be captured"
        except DeviceOutOfMemory:
            raise
        except PipelineError as error:
            reason = error.message
        _log.warning("graph_not_captured", batch=self._bucket.rows, reason=reason)
        return None

    def _taken(self, spec: TensorSpec, rows: int) -> Array:
        array = self._buffers[spec.name].array
        return (array[:rows] if spec.name in self._tensors.batched else array).copy()

    def _free(self) -> None:
        if self._graph is not None:
            self._cuda.free_graph(self._graph)
            self._graph = None
        self._context = None
        while self._buffers:
            self._buffers.popitem()[1].free()
