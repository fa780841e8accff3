"""Reads weight files with numpy alone: no framework, and no code out of the file is run."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[Any]]

TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def read_safetensors(path: Path) -> Weights:
    """All arrays of a .safetensors file, read-only.

    The format: 8 bytes length, that much JSON {name: {dtype, shape, data_offsets}}, then the bytes.
    """
    dtypes = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    content = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[start + first : start + last]
        weights[name] = np.frombuffer(data, dtypes[entry["dtype"]]).reshape(entry["shape"])
    return weights


def read_torch(path: Path) -> Weights:
    """All arrays of a state dictionary that PyTorch wrote before version 1.6.

    The format: three pickles (magic number, protocol, machine), the pickled dictionary, in which
    a tensor is a view on a numbered storage, the pickled list of storages, and then in that order
    the bytes of each: 8 bytes length, counted in numbers, and the numbers.
    Raises pickle.UnpicklingError if the file asks for anything but tensors.
    """
    with path.open("rb") as file:
        magic, _protocol, _machine = (_TensorUnpickler(file).load() for _ in range(3))
        if magic != TORCH_MAGIC:
            raise pickle.UnpicklingError(f"expected {path} to be of PyTorch before 1.6, it is not")
        tensors = _TensorUnpickler(file).load()
        order = _TensorUnpickler(file).load()
        storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        numbers = {key: _read_storage(file, storages[key]) for key in order}
    return {name: tensor.view(numbers[tensor.storage.key]) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    size: int  # in numbers


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    def view(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """numpy refuses a view that would reach outside the storage."""
        width = numbers.itemsize
        strides = [stride * width for stride in self.strides]
        return np.ndarray(self.shape, numbers.dtype, numbers, self.offset * width, strides)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """Knows the four names that a state dictionary needs, as stand-ins, and refuses all others.

    A pickle is a program that may call whatever it can name, so what it can name decides
    what it can do.
    """

    NAMES: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch", "FloatStorage"): np.dtype("<f4"),
        ("torch", "LongStorage"): np.dtype("<i8"),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"expected nothing but tensors, the file asks for {module}.{name}; do not trust it"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _device, size, _view = pid
        return _Storage(key, dtype, size)


def _read_storage(file: BinaryIO, storage: _Storage) -> NDArray[Any]:
    size = int.from_bytes(file.read(8), "little")
    if size != storage.size:
        raise pickle.UnpicklingError(f"expected {storage.size} numbers, the file holds {size}")
    return np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype)
