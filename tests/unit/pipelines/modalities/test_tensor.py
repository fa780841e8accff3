from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.bundle import Bundle
from pipelines.modalities.tensor import decode_array, from_buffer
from schemas.errors import InvalidJob, InvalidModel


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle()


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_header(text: str, body: bytes = b"") -> bytes:
    header = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def refusal(step: Callable[[bytes], Any], data: bytes) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        step(data)
    return caught.value


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float64).reshape(2, 3),
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(6, dtype=np.int64).reshape(2, 3),
    ],
)
def test_an_array_becomes_a_row_of_the_models_dtype(bundle: Bundle, array: Any) -> None:
    row = decode_array(bundle, input="x", dtype="float32", shape=[None, 3])(npy(array))
    assert row["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert row["x"].dtype == np.float32
    assert row["x"].flags.c_contiguous


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "payload_empty", "0 bytes"),
        (b"hello", "array_unreadable", "text"),
        (npy(np.zeros(3))[:40], "array_unreadable", "a NumPy array"),
        (npy(np.zeros((2, 3), np.float32))[:-1], "array_size", "Expected 24 bytes"),
        (npy(np.zeros((2, 3), np.float32)) + b"x", "array_size", "came 25"),
        (npy(np.zeros((2, 4), np.float32)), "array_shape", "[any, 3]"),
        (npy(np.zeros(3, np.float32)), "array_shape", "came [3]"),
        (npy(np.zeros((0, 3), np.float32)), "array_shape", "came [0, 3]"),
        (npy(np.zeros((2, 3), np.complex64)), "array_dtype", "complex64"),
        (npy(np.array([["a"] * 3] * 2)), "array_dtype", "<U1"),
        (npy(np.array([[None] * 3] * 2), allow_pickle=True), "array_dtype", "object"),
        (npy(np.zeros((2, 3), [("a", "f4")])), "array_dtype", "'a'"),
    ],
)
def test_an_array_that_is_refused(bundle: Bundle, data: bytes, code: str, words: str) -> None:
    error = refusal(decode_array(bundle, input="x", dtype="float32", shape=[None, 3]), data)
    assert error.code == code
    assert words in error.message


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**12, 3)}"),
            "unreadable",
        ),
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3)}"),
            "size",
        ),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}"), "shape"),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}"), "size"),
        (npy_header("(" * 3000), "unreadable"),
        (npy_header("{'descr': 'V9999999999', 'fortran_order': False, 'shape': ()}"), "unreadable"),
        (npy_header("__import__('os').getcwd()"), "unreadable"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1), "unreadable"),
        (b"\x93NUMPY\x09\x00" + bytes(64), "unreadable"),
    ],
)
def test_a_header_that_lies_costs_nothing(bundle: Bundle, data: bytes, code: str) -> None:
    step = decode_array(bundle, input="x", dtype="float32", shape=[None, 3])
    assert refusal(step, data).code == f"array_{code}"


def test_numbers_are_not_rounded_to_another_kind(bundle: Bundle) -> None:
    step = decode_array(bundle, input="ids", dtype="int64", shape=[None])
    assert refusal(step, npy(np.array([0.5]))).code == "array_dtype"
    assert step(npy(np.array([3], np.int32)))["ids"].dtype == np.int64


def test_bare_bytes_become_a_row(bundle: Bundle) -> None:
    step = from_buffer(bundle, input="x", dtype="int16", shape=[None, 2])
    assert step(struct.pack("<4h", 1, -2, 3, 4))["x"].tolist() == [[1, -2], [3, 4]]


@pytest.mark.parametrize(
    ("shape", "count", "code"),
    [
        ([None, 2], 0, "payload_empty"),
        ([None, 2], 3, "array_size"),
        ([3], 4, "array_size"),
        ([3], 6, "array_size"),
    ],
)
def test_bare_bytes_of_another_length_are_refused(
    bundle: Bundle, shape: list[int | None], count: int, code: str
) -> None:
    step = from_buffer(bundle, input="x", dtype="int16", shape=shape)
    assert refusal(step, bytes(2 * count)).code == code
    assert code == "payload_empty" or refusal(step, bytes(2 * count + 1)).code == code


def test_two_open_axes_cannot_be_told_from_a_length(bundle: Bundle) -> None:
    with pytest.raises(InvalidModel, match="one null at most"):
        from_buffer(bundle, input="x", dtype="int16", shape=[None, None])
