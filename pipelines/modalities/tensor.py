"""Tensor steps: a payload that already is an array, as a `.npy` file or as bare bytes.

No memory is taken by a header's word: an array is a view of the payload or it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.modalities import preprocess_step
from pipelines.modalities.magic import looks_like
from schemas.errors import InvalidJob, InvalidModel

Row = dict[str, NDArray[Any]]
Dtype = Literal[
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64",
]  # fmt: skip
Axis = Annotated[int, Meta(ge=1)] | None
"""None: of any length."""

_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MAX_HEADER_BYTES = 4096


@preprocess_step("decode_array")
def decode_array(
    bundle: Bundle, input: str, dtype: Dtype, shape: list[Axis]
) -> Callable[[bytes], Row]:
    """A `.npy` file to one engine input. dtype: others of the same kind are converted.
    shape: without the batch axis, null where any length will do."""
    wanted = np.dtype(dtype)

    def decode(data: bytes) -> Row:
        came_shape, column_major, came, start = _header(data)
        if came.hasobject or not np.can_cast(came, wanted, "same_kind"):
            raise InvalidJob("array_dtype", f"Expected {wanted}, came {came}; convert it.")
        _check_shape(came_shape, shape)
        if (bytes_expected := math.prod(came_shape) * came.itemsize) != len(data) - start:
            raise _wrong_size(bytes_expected, len(data) - start)
        flat = np.frombuffer(data, came, offset=start)
        array = flat.reshape(came_shape, order="F" if column_major else "C")
        return {input: np.ascontiguousarray(array, wanted)}

    return decode


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    if not data:
        raise InvalidJob("payload_empty", "Expected a .npy file, came 0 bytes.")
    file = BytesIO(data)
    try:
        read = _HEADER_READERS[npy.read_magic(file)]
        shape, column_major, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
    except MemoryError:
        raise
    except Exception as error:  # numpy evaluates the header as a literal, which fails in many ways
        raise InvalidJob(
            "array_unreadable",
            f"Expected a .npy file, came {len(data)} bytes that look like {looks_like(data)}.",
        ) from error
    return shape, column_major, dtype, file.tell()


@preprocess_step("from_buffer")
def from_buffer(
    bundle: Bundle, input: str, dtype: Dtype, shape: list[Axis]
) -> Callable[[bytes], Row]:
    """Bare little-endian bytes to one engine input. shape: without the batch axis, at most one
    null, which the payload's length decides."""
    kind = np.dtype(dtype).newbyteorder("<")
    if shape.count(None) > 1:
        raise InvalidModel("model_step_invalid", "from_buffer: shape may hold one null at most")
    unit = math.prod(axis or 1 for axis in shape) * kind.itemsize

    def decode(data: bytes) -> Row:
        if not data:
            raise InvalidJob("payload_empty", f"Expected {kind}{_words(shape)}, came 0 bytes.")
        if len(data) % unit or (None not in shape and len(data) != unit):
            raise _wrong_size(unit, len(data))
        sizes = [len(data) // unit if axis is None else axis for axis in shape]
        return {input: np.frombuffer(data, kind).reshape(sizes)}

    return decode


def _check_shape(came: tuple[int, ...], wanted: list[Axis]) -> None:
    if len(came) != len(wanted) or any(
        axis < 1 or (expected is not None and axis != expected)
        for axis, expected in zip(came, wanted, strict=False)
    ):
        raise InvalidJob(
            "array_shape",
            f"Expected shape {_words(wanted)} without the batch axis, came {list(came)}.",
        )


def _words(shape: list[Axis]) -> str:
    return f"[{', '.join('any' if axis is None else str(axis) for axis in shape)}]"


def _wrong_size(expected: int, came: int) -> InvalidJob:
    return InvalidJob("array_size", f"Expected {expected} bytes of numbers, came {came}.")
