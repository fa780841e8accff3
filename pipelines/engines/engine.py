"""The engine interface: what a compiled, loaded model and the backend that makes it look like.

On a job's path an engine is the step between preprocessing and postprocessing: batched arrays in,
batched arrays out. One file per backend stands beside this one; none of them is named above.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from schemas.errors import InferenceFailed, Transient
from schemas.models import Precision, ShapeRange

Array = NDArray[Any]
Arrays = Mapping[str, Array]

OnStep = Callable[[str], None]
"""Called with the name of a step of loading as it ends."""


def unheard(_step: str) -> None:
    """Where nobody wants to know of the steps."""


class DeviceOutOfMemory(Transient):
    """The device had no room for weights or activations. Retryable: smaller batch, or later."""

    def __init__(self, message: str) -> None:
        super().__init__("device_out_of_memory", message)


class TensorSpec(Struct, frozen=True):
    """One input or output. shape: axis 0 is the batch, None is a dynamic axis; None as a whole
    means that the model does not tell the rank. dtype of strings: object."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[...]"
        return (
            f"{self.dtype}[{', '.join('N' if axis is None else str(axis) for axis in self.shape)}]"
        )

    def admits(self, array: Array) -> bool:
        if array.dtype != self.dtype and not (self.dtype.kind == "O" and array.dtype.kind == "U"):
            return False
        if self.shape is None:
            return True
        return len(self.shape) == array.ndim and all(
            axis is None or axis == came for axis, came in zip(self.shape, array.shape, strict=True)
        )


class Profile(Struct, frozen=True):
    """What an engine is compiled for; part of the cache key.

    buckets: the batch sizes it will run, ascending. A backend with static plans makes one
    optimisation profile of each; one that takes any shape may ignore them.
    ranges: by input name, where axes beside the batch are dynamic and the backend must know them.
    precision: of the computing; that of int8 is in the graph already.
    """

    buckets: tuple[int, ...]
    ranges: dict[str, ShapeRange] = field(default_factory=dict)
    precision: Precision = "float32"


class Engine(ABC):
    """A compiled model, loaded on its device. Safe to run from several threads at once.

    A backend implements `_run` and `_close`; state and inputs are already checked when they are
    called, and `_close` is called once, when no run is under way.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], memory_bytes: int
    ) -> None:
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = tuple(outputs)
        self._memory_bytes = memory_bytes
        self._state = threading.Condition()
        self._runs = 0
        self._closed = False
        self._after_close: list[Callable[[], None]] = []

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self._inputs.values())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def memory_bytes(self) -> int:
        """Device memory of the weights, in bytes; activations of running batches come on top."""
        return self._memory_bytes

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Run one batch.

        inputs: exactly the names, dtypes and shapes of `inputs`; they are read, never kept.
        Returns every output by name; the arrays belong to the caller.
        Raises InferenceFailed (wrong input, or the model failed on it), DeviceOutOfMemory
        (retryable) and Transient (the engine was closed; load it again).
        """
        with self._state:
            if self._closed:
                raise Transient(
                    "engine_closed", "Expected a loaded engine, it is closed; load it again."
                )
            self._runs += 1
        try:
            self._check(inputs)
            return self._run(inputs)
        finally:
            with self._state:
                self._runs -= 1
                self._state.notify_all()

    def close(self) -> None:
        """Free the device memory. Waits for runs under way; later ones are refused. Idempotent."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.wait_for(lambda: self._runs == 0)
        self._close()
        for callback in self._after_close:
            callback()

    def after_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the memory is free, such as to end the lease on the artefact."""
        self._after_close.append(callback)

    @abstractmethod
    def _run(self, inputs: Arrays) -> dict[str, Array]:
        """Run one checked batch; may be called from several threads at once."""

    @abstractmethod
    def _close(self) -> None:
        """Free what the engine holds on its device."""

    def _check(self, inputs: Arrays) -> None:
        if inputs.keys() != self._inputs.keys():
            raise InferenceFailed(
                "wrong_engine_inputs",
                f"Expected the inputs {sorted(self._inputs)}, got {sorted(inputs)}; "
                "name them so in the last preprocess step.",
            )
        for name, array in inputs.items():
            spec = self._inputs[name]
            if not spec.admits(array):
                raise InferenceFailed(
                    "wrong_engine_input",
                    f"Expected {spec} for input {name!r}, got {array.dtype}{list(array.shape)}; "
                    "convert it in a preprocess step.",
                )


class Backend(Protocol):
    """Makes artefacts of models, and engines of artefacts. Building one opens no device."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """The exact version of the vendor's library."""

    def fingerprint(self) -> dict[str, object]:
        """What of backend and device an artefact depends on, JSON-able; part of the cache key."""

    def compile(self, model: Path, profile: Profile, into: Path) -> None:
        """Write the artefact of an ONNX file into the empty folder `into`.

        Files only, all that `load` needs, nothing that refers outside the folder.
        Raises InvalidModel, DeviceOutOfMemory, or Transient("disk_full").
        """

    def load(self, artefact: Path, *, threads: int) -> Engine:
        """Load what `compile` wrote. threads: that one run may use, beside callers' own.

        The files must stay as they are until the engine is closed: backends map them into memory.
        Raises InvalidModel (artefact unusable) or DeviceOutOfMemory.
        """
